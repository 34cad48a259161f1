"""Guidance: the target is the attention that eager attention shows, and its loss ranks tokens and counts none."""

import pytest
import torch
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, prune_mode
from llava_prune.guidance import AttentionGuide
from llava_prune.losses import guidance_loss

LAYERS = (1, 3)


def test_the_target_is_where_text_after_the_image_looks(tower_folder):
    llava = tiny_llava(tower_folder, attention="eager")
    inputs = batch_of([9, 12, 6], [1, 2, 0], answers=[2, 3, 2])
    with torch.no_grad():
        attentions = llava(**inputs, output_attentions=True).attentions
    handle = attach_pruners(llava, PruneConfig(pruning_layers=LAYERS, target_token_num=10, pruner_dim=16))
    randomise_pruners(handle)
    handle.state.guided = True
    with prune_mode(llava, "soft"), torch.no_grad():
        llava(**inputs)
    record = handle.state.record
    guide = AttentionGuide(handle.decoder.layers, record)
    assert handle.unpruned_features(record, guide.watch) == {}
    layout = record.layout
    for layer in LAYERS:
        target = guide.target(layer)
        for row in range(3):
            text = layout.text_after_image[row]
            vision = layout.vision[row]
            paid = sum(a[row].mean(0)[text][:, vision].mean(0) for a in attentions[layer:])
            expected = paid / paid.sum() if vision.any() else paid
            found = target[row, : int(vision.sum())]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
            assert not target[row, int(vision.sum()) :].any()


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


def test_a_merger_leaves_nothing_to_look_at():
    with pytest.raises(ValueError, match="enable_token_merger"):
        PruneConfig(target_token_num=10, guidance_weight=1.0, enable_token_merger=True)
    with pytest.raises(ValueError, match="guidance_weight must be at least 0"):
        PruneConfig(target_token_num=10, guidance_weight=-1.0)
