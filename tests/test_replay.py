"""Guidance learns again from what earlier steps brought, and from nothing that was not so."""

import pytest
import torch

from llava_prune import PruneConfig
from llava_prune.losses import guidance_loss
from llava_prune.pruner import LayerPruner, PrunerInputs
from llava_prune.replay import Lesson, Replay

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
    replay = Replay(capacity=2, count=6)
    old, new = lesson_of(1, tokens=5, question=7, residual=residual), lesson_of(2, 9, 3, residual)
    first = replay.joined({1: old})[1]
    assert torch.equal(first.share, old.share), "at the first step there is nothing to remember"
    joined = replay.joined({1: new})[1]
    assert len(joined.share) == 8
    logits = pruner(*joined.inputs)
    torch.testing.assert_close(logits[:2], pruner(*new.inputs))
    known = pruner(*old.inputs)
    of_old = [int((logits[i, :5] - known).flatten(1).norm(dim=1).argmin()) for i in range(2, 8)]
    assert set(of_old) == {0, 1}
    torch.testing.assert_close(logits[2:, :5], known[of_old])
    assert joined.valid[2:].sum(-1).tolist() == [5] * 6

    def loss(logits, lesson, rows):
        return guidance_loss(logits[rows], lesson.share[rows], lesson.valid[rows], torch.ones(len(rows)))

    torch.testing.assert_close(loss(logits, joined, list(range(2, 8))), loss(known, old, of_old))


def test_the_oldest_are_forgotten():
    replay = Replay(capacity=4, count=100)
    for seed in range(4):
        replay.joined({1: lesson_of(seed, 3, 2)})
    drawn = replay.joined({1: lesson_of(9, 3, 2)})[1].share[2:]
    kept = torch.cat([lesson_of(seed, 3, 2).share for seed in (2, 3)])
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in kept.tolist()}


def test_a_number_under_0_is_refused():
    with pytest.raises(ValueError, match="guidance_replays must be at least 0"):
        PruneConfig(target_token_num=10, guidance_replays=-1)
