"""Guidance learns again from what earlier steps brought, and from nothing that was not so."""

import pytest
import torch

from llava_prune import PruneConfig
from llava_prune.losses import guidance_loss
from llava_prune.pruner import LayerPruner, PrunerInputs
from llava_prune.replay import Lesson, Replay, joined

SIZES = {"pruner_rank": 8, "pruner_dim": 16, "pruner_heads": 2}


def lesson_of(seed, tokens, question, residual=True, batch=2):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(batch, *shape, generator=generator)

    inputs = PrunerInputs(
        vision=random(tokens, 24),
        places=random(tokens, 2),
        visible=torch.zeros(batch, tokens),
        question=random(question, 24),
        question_mask=torch.ones(batch, question, dtype=torch.bool),
        attn_residual=random(tokens) if residual else None,
    )
    share = random(tokens)
    return Lesson(inputs, share / share.sum(-1, keepdim=True), torch.ones(batch, tokens, dtype=torch.bool))


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_a_joined_batch_teaches_what_its_parts_teach(residual):
    """Samples of other lengths are padded with what changes neither logits nor loss."""
    torch.manual_seed(0)
    config = PruneConfig(pruning_layers=(1,), target_token_num=4, use_attn_residual=residual, **SIZES)
    pruner = LayerPruner(24, config)
    replay = Replay(capacity=2)
    old, new = lesson_of(1, tokens=5, question=7, residual=residual), lesson_of(2, 9, 3, residual)
    with pytest.raises(ValueError, match="nothing is remembered"):
        replay.drawn(6)
    replay.remember({1: old})
    both = joined({1: new}, replay.drawn(6))[1]
    assert len(both.share) == 8
    logits = pruner(*both.inputs)
    torch.testing.assert_close(logits[:2], pruner(*new.inputs))
    known = pruner(*old.inputs)
    of_old = [int((logits[i, :5] - known).flatten(1).norm(dim=1).argmin()) for i in range(2, 8)]
    assert set(of_old) == {0, 1}
    torch.testing.assert_close(logits[2:, :5], known[of_old])
    assert both.valid[2:].sum(-1).tolist() == [5] * 6

    def loss(logits, lesson, rows):
        return guidance_loss(logits[rows], lesson.share[rows], lesson.valid[rows], torch.ones(len(rows)))

    torch.testing.assert_close(loss(logits, both, list(range(2, 8))), loss(known, old, of_old))


def test_the_oldest_are_forgotten():
    replay = Replay(capacity=4)
    for seed, tokens, question in ((0, 3, 2), (1, 3, 2), (2, 3, 1), (3, 3, 4)):
        replay.remember({1: lesson_of(seed, tokens, question)})
    assert len(replay) == 4
    drawn = replay.drawn(100)[1].share
    kept = torch.cat([lesson_of(seed, 3, question).share for seed, question in ((2, 1), (3, 4))])
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in kept.tolist()}


def test_a_number_under_0_is_refused():
    with pytest.raises(ValueError, match="guidance_replays must be at least 0"):
        PruneConfig(target_token_num=10, guidance_replays=-1)
