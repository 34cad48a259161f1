"""Guidance: the target is what eager attention's masks say the answer depends on; the loss ranks tokens alone."""

import pytest
import torch
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, prune_mode
from llava_prune.guidance import guided_pass
from llava_prune.losses import guidance_loss

LAYERS = (1, 3)


def with_slopes(llava, inputs, handle):
    """Slopes above 0 (layers, B, T) of the answers' log-odds by what each value is multiplied with, and features."""
    gates, seen = [], {}

    def multiply(_projection, _inputs, values):
        gates.append(torch.ones(values.shape[:2], requires_grad=True))
        return values * gates[-1][..., None]

    hooks = [layer.self_attn.v_proj.register_forward_hook(multiply) for layer in handle.decoder.layers]
    hooks += [
        layer.register_forward_hook(lambda _m, _i, output, place=place: seen.update({place: output[0].detach()}))
        for place, layer in enumerate(handle.decoder.layers)
    ]
    logits = llava(**inputs).logits
    for hook in hooks:
        hook.remove()
    labels = handle.state.announced.labels if handle.state.announced else handle.state.record.layout.labels
    odds = 0
    for row in range(len(labels)):
        places = (labels[row] != -100).nonzero()[:, 0].tolist()
        for place in places[:-1] or places:
            p = logits[row, place - 1].softmax(-1)[labels[row, place]]
            odds = odds + (p / (1 - p)).log()
    return torch.stack(torch.autograd.grad(odds, gates)).relu(), seen


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_target_is_what_the_answer_depends_on(tower_folder, side, checkpointing):
    inputs = batch_of([9, 12, 6, 8], [1, 2, 0, 1], side, answers=[2, 3, 2, 1])
    eager = tiny_llava(tower_folder, attention="eager", padding_side=side)
    handle = attach_pruners(eager, PruneConfig(pruning_layers=LAYERS, target_token_num=10, pruner_dim=16))
    slopes, stock = with_slopes(eager.train(), inputs, handle)

    llava = tiny_llava(tower_folder, padding_side=side).train().requires_grad_(False)
    if checkpointing:
        llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle = attach_pruners(llava, PruneConfig(pruning_layers=LAYERS, target_token_num=10, pruner_dim=16))
    randomise_pruners(handle)
    handle.state.guided = True
    with prune_mode(llava, "soft"):
        llava(**inputs, use_cache=False)
        record = handle.state.record
        features, entering, shares = guided_pass(handle.decoder, llava.lm_head, record, LAYERS, (2, 4))
    layout = record.layout
    for layer in (2, 4):
        assert not features[layer].requires_grad
        torch.testing.assert_close(features[layer][layout.valid], stock[layer][layout.valid], atol=1e-4, rtol=1e-4)
    assert set(shares) == set(entering) == set(LAYERS)
    for layer in LAYERS:
        torch.testing.assert_close(entering[layer][layout.valid], stock[layer - 1][layout.valid], atol=1e-4, rtol=1e-4)
    for layer, share in shares.items():
        paid = slopes[layer:].sum(0)
        for row in range(4):
            expected = paid[row][layout.vision[row]]
            count = len(expected)
            if count:
                torch.testing.assert_close(share[row, :count], expected / expected.sum(), atol=1e-5, rtol=1e-3)
            assert not share[row, count:].any()


def test_the_loss_ranks_tokens_and_leaves_their_number_alone():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 6, generator=generator)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    target = target * valid / (target * valid).sum(-1, keepdim=True)
    weights = torch.ones(2)
    keep = target.clamp(min=1e-9).log()
    logits = torch.stack([torch.zeros_like(keep), keep], -1).requires_grad_()
    loss = guidance_loss(logits, target, valid, weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-6, "keep logits in the target's proportions are the minimum"
    logits, loss = logits.detach(), loss.item()
    assert guidance_loss(logits + torch.tensor([0.0, 3.0]), target, valid, weights) == pytest.approx(loss)
    worse = torch.stack([torch.zeros_like(keep), -keep], -1)
    assert guidance_loss(worse, target, valid, weights) > loss
    changed = logits.clone()
    changed[1, 4:] += 5
    assert guidance_loss(changed, target, valid, weights) == pytest.approx(loss), "filler counts"
    assert guidance_loss(worse, target, valid, torch.tensor([0.0, 0.0])) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pass_that_ends_before_the_first_pruner_serves_guidance_as_a_whole_one(tower_folder, side):
    """And pruners that read the unpruned states of their layer say what they say in a pass that drops nothing."""
    inputs = batch_of([9, 12, 6, 8], [1, 2, 0, 1], side, answers=[2, 3, 2, 1])
    llava = tiny_llava(tower_folder, padding_side=side).train().requires_grad_(False)
    sizes = {"pruner_dim": 16, "min_keep": 10**6, "use_attn_residual": True}
    handle = attach_pruners(llava, PruneConfig(pruning_layers=LAYERS, target_token_num=10, **sizes))
    randomise_pruners(handle)
    handle.state.guided = True
    passes = []
    for prefix_only in (False, True):
        handle.state.prefix_only = prefix_only
        with prune_mode(llava, "masked"):
            llava(**inputs, use_cache=False)
        record = handle.state.record
        unpruned = guided_pass(handle.decoder, llava.lm_head, record, LAYERS, ())
        passes.append((record, unpruned))
    (whole, expected), (short, found) = passes
    assert short.logits == short.masks == {}
    for layer in LAYERS:
        torch.testing.assert_close(found.shares[layer], expected.shares[layer])
        valid = whole.layout.vision_valid
        logits = handle.scorers[layer].pruner(*handle.pruner_inputs(layer, found.entering[layer], short))
        torch.testing.assert_close(logits[valid], whole.logits[layer][valid], atol=1e-4, rtol=1e-4)
        assert logits.requires_grad


@pytest.mark.parametrize("values", [{"selection": "topk"}, {"guidance_weight": 1.0}], ids=["no weight", "threshold"])
def test_guidance_alone_needs_a_weight_and_exact_budgets(values):
    with pytest.raises(ValueError, match="guidance_only_ratio needs a guidance_weight above 0 and selection 'topk'"):
        PruneConfig(target_token_num=10, guidance_only_ratio=0.5, **values)


def test_a_merger_leaves_nothing_to_look_at():
    with pytest.raises(ValueError, match="enable_token_merger"):
        PruneConfig(target_token_num=10, guidance_weight=1.0, enable_token_merger=True)
    with pytest.raises(ValueError, match="guidance_weight must be at least 0"):
        PruneConfig(target_token_num=10, guidance_weight=-1.0)
