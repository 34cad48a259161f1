"""What a layer's pruner looks at."""

import pytest
import torch

from llava_prune import PruneConfig
from llava_prune.layout import TokenLayout, places_of
from llava_prune.pruner import LayerPruner, PrunerInputs, logits_of, waves
from llava_prune.soft_attention import HIDDEN

SIZES = {"pruner_rank": 8, "pruner_dim": 16, "pruner_heads": 2}


def pruner_of(**values):
    torch.manual_seed(0)
    return LayerPruner(24, PruneConfig(pruning_layers=(1,), target_token_num=4, **SIZES, **values))


def inputs_of(batch, tokens=5, question=4):
    vision = torch.randn(1, tokens, 24).expand(batch, -1, -1)
    places, visible = torch.rand(1, tokens, 2).expand(batch, -1, -1), torch.zeros(batch, tokens)
    return vision, places, visible, torch.randn(batch, question, 24), torch.ones(batch, question, dtype=torch.bool)


@pytest.mark.parametrize("use_question", [True, False])
@torch.no_grad()
def test_only_a_pruner_that_uses_the_question_depends_on_it(use_question):
    pruner = pruner_of(use_question=use_question)
    *picture, questions, valid = inputs_of(3)
    valid[2] = False
    logits = pruner(*picture, questions, valid)
    assert torch.equal(logits[0], logits[1]) == torch.equal(logits[0], logits[2]) == (not use_question)
    assert torch.allclose(logits[2], pruner(*picture, questions[:, :0], valid[:, :0])[2], atol=1e-6)


@torch.no_grad()
def test_what_is_not_visible_says_nothing_and_what_is_does():
    pruner = pruner_of()
    vision, places, visible, *question = inputs_of(1)
    other = vision.clone()
    other[:, 3] = torch.randn(24)
    seen, unseen = visible, visible.index_fill(1, torch.tensor([3]), HIDDEN)

    def first(vision, visible):
        return pruner(vision, places, visible, *question)[:, :3]

    assert torch.equal(first(vision, unseen), first(other, unseen))
    assert not torch.equal(first(vision, seen), first(other, seen))
    gone = pruner(vision[:, :3], places[:, :3], seen[:, :3], *question)
    torch.testing.assert_close(first(vision, visible.index_fill(1, torch.tensor([3, 4]), HIDDEN)), gone)


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_no_weight_makes_the_scores_of_a_normalised_pruner_grow(normalised):
    pruner = pruner_of(pruner_qk_norm=normalised)
    inputs = inputs_of(1)
    before = pruner(*inputs)
    for look in (pruner.neighbours, pruner.looking, pruner.attention):
        for part in (look.to_query, look.to_key):
            part.weight *= 1e4
    after = pruner(*inputs)
    assert torch.allclose(before, after, atol=1e-4) == normalised


@torch.no_grad()
def test_tokens_are_judged_with_their_neighbours():
    """Where the question learns nothing of the picture, every other token still says something about a token."""
    pruner = pruner_of()
    pruner.looking.to_output.weight.zero_()
    vision, *rest = inputs_of(1)
    other = vision.clone()
    other[:, 0] = torch.randn(24)
    assert ((pruner(other, *rest) - pruner(vision, *rest)).abs() > 0).all()


@torch.no_grad()
def test_at_the_start_tokens_look_at_what_is_near():
    """Scores of 24 equal tokens in a row, mean over pruners and heads: of themselves, the next, and all others."""
    places = torch.stack([torch.full((24,), 0.5), (torch.arange(24) + 0.5) / 24], -1)[None]
    scores = []
    for seed in range(20):
        torch.manual_seed(seed)
        pruner = LayerPruner(24, PruneConfig(pruning_layers=(1,), target_token_num=4))
        embedded = torch.nn.functional.layer_norm(pruner.place(waves(places)), (128,))
        scores.append(pruner.neighbours.to_query(embedded) @ pruner.neighbours.to_key(embedded).mT)
    scores = torch.cat(scores).mean(0)
    own, following = scores.diagonal().mean(), scores.diagonal(1).mean()
    others = scores[torch.ones_like(scores, dtype=torch.bool).triu(2)].mean()
    assert own > 1.1 * following > 1.1**2 * others


@torch.no_grad()
def test_equal_tokens_differ_by_their_place():
    pruner = pruner_of()
    vision, places, *rest = inputs_of(1)
    vision = vision[:, :1].expand(-1, 5, -1)
    logits = pruner(vision, places, *rest)
    assert len(logits[0, :, 0].unique()) == 5
    moved = pruner(vision, places.flip(1), *rest)
    torch.testing.assert_close(moved, logits.flip(1))


def test_places_are_rows_and_columns_of_square_pictures():
    """A text token, two pictures of 2 x 2 with text between them, and a picture of 3 tokens, padded at the left."""
    vision = torch.tensor([[False, *[True] * 4, False, *[True] * 4], [*[False] * 7, *[True] * 3]])
    valid = torch.ones_like(vision)
    valid[1, :6] = False
    layout = TokenLayout.build(valid, vision, torch.tensor([2, 1]))
    square = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    found = places_of(layout.vision, layout.vision_counts, layout.num_images, layout.vision_index)
    torch.testing.assert_close(found[0], torch.tensor(square * 2))
    torch.testing.assert_close(found[1, :3], torch.tensor([[1 / 6, 0.5], [3 / 6, 0.5], [5 / 6, 0.5]]))


def test_no_logit_settles():
    """However large the last layer grows, and the attention residual with it: a keep logit can still be moved."""
    pruner = pruner_of(use_attn_residual=True, init_keep_logit=2.5, logit_cap=3.0)
    inputs = inputs_of(2)

    def margin(residual=0.0):
        logits = pruner(*inputs, torch.full((2, 5), residual))
        return logits[..., 1] - logits[..., 0]

    assert torch.allclose(margin(), torch.tensor(2.5), atol=0.1)
    with torch.no_grad():
        pruner.joint_logits.weight.mul_(1000)
    assert margin(3.0).abs().max() <= 3.0 and margin().std() > 1


def test_a_compiled_pruner_is_the_pruner():
    """Of questions of any length one program a batch size, the same for all pruners."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pruners = [pruner_of(), pruner_of()]
    with torch.no_grad():
        for parameter in pruners[1].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for batch, question in ((2, 4), (5, 6), (5, 9)):
        inputs = PrunerInputs(*inputs_of(batch, question=question), None)
        for pruner in pruners:
            results = []
            for compiled in (False, True):
                logits = logits_of(pruner, inputs, compiled)
                results.append((logits, *torch.autograd.grad(logits.square().sum(), pruner.looking.parameters())))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
