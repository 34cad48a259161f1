"""Every trainable weight of the plug-in learns, with gradient checkpointing and without; reentrant is refused."""

import pytest
import torch
from tiny import batch_of, randomise_pruners

from llava_prune import PruneConfig, attach_pruners, prune_mode
from llava_prune.objective import budget_terms
from llava_prune.soft_attention import HIDDEN

CONFIG = PruneConfig(
    pruning_layers=(1, 3),
    target_token_num=6,
    pruner_dim=16,
    pruner_heads=4,
    use_attn_residual=True,
    enable_token_merger=True,
    merger_tokens=9,
    merger_heads=4,
)


def gradients(model, config, mode, checkpointing, lengths=(9, 12), images=(1, 1)):
    model.train().requires_grad_(False)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    handle = attach_pruners(model, config)
    handle.pruners.requires_grad_(True)
    randomise_pruners(handle, scale=0.1)
    inputs = batch_of(list(lengths), list(images), answers=[2] * len(lengths))
    torch.manual_seed(4)
    with prune_mode(model, mode):
        loss = model(**inputs).loss
        terms, _ = budget_terms(config, handle.state.record, handle.num_layers, 1.0)
        (loss + terms["sparsity"] + terms["binarization"]).backward()
    return {name: parameter.grad for name, parameter in handle.pruners.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("mode", ["soft", "masked"])
def test_every_parameter_gets_a_gradient(llava, mode, checkpointing):
    for name, gradient in gradients(llava, CONFIG, mode, checkpointing).items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        # a key's bias shifts all scores of a softmax alike
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("estimator", ["gumbel_soft", "gumbel_st", "sigmoid_st", "topk_st"])
def test_checkpointing_changes_no_gradient(tower_folder, estimator):
    from tiny import tiny_llava

    config = PruneConfig.from_dict(
        {**CONFIG.to_dict(), "estimator": estimator, "selection": "topk" if "topk" in estimator else "threshold"}
    )
    stored = gradients(tiny_llava(tower_folder), config, "soft", False)
    checkpointed = gradients(tiny_llava(tower_folder), config, "soft", True)
    for name, gradient in stored.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


@pytest.mark.parametrize("estimator", ["gumbel_soft", "gumbel_st"])
def test_a_pruner_looks_in_training_at_what_it_would_be_shown_in_inference(llava, estimator):
    """Were it shown the noisy masks, slopes from pruner to pruner would multiply, up to a million each."""
    config = PruneConfig(pruning_layers=(1, 3), target_token_num=6, pruner_dim=16, pruner_heads=4, estimator=estimator)
    handle = attach_pruners(llava.train().requires_grad_(False), config)
    randomise_pruners(handle, bias=0.0)
    seen = []
    hook = handle.pruners.layers["3"].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    with hook, prune_mode(llava, "soft"):
        llava(**batch_of([9, 12], [1, 1], answers=[2, 2]))
    kept = handle.state.record.kept[1]
    assert 0 < kept.sum() < kept.numel() and not seen[0].requires_grad
    assert torch.equal(seen[0] == 0, kept) and (seen[0][~kept] == HIDDEN).all()


def test_no_draw_of_the_noise_rules_a_training(llava):
    """Where noise drops all that a pruner would look at, its gradient is still of the size of any other."""
    config = PruneConfig(
        pruning_layers=(0, 1, 2, 3), target_token_num=6, pruner_dim=16, pruner_heads=4, estimator="gumbel_st"
    )
    llava.train().requires_grad_(False)
    sizes = []
    for seed in range(40):
        with attach_pruners(llava, config) as handle, prune_mode(llava, "soft"):
            randomise_pruners(handle, seed, bias=-0.1, scale=0.5)
            handle.pruners.requires_grad_(True)
            torch.manual_seed(seed)
            llava(**batch_of([9, 12], [1, 1], answers=[2, 2])).loss.backward()
            sizes.append(max(p.grad.norm() for p in handle.pruners.parameters() if p.grad is not None))
    sizes = torch.stack(sizes)
    assert sizes.max() < 20 * sizes.median()


def test_a_batch_without_images_still_runs_every_pruner(llava):
    """A rank whose samples are all text must not leave the others waiting in a collective."""
    config = PruneConfig.from_dict({**CONFIG.to_dict(), "enable_token_merger": False})
    for name, gradient in gradients(llava, config, "soft", False, lengths=(6, 8), images=(0, 0)).items():
        assert gradient is not None and gradient.abs().sum() == 0, name


def test_reentrant_checkpointing_is_refused(llava):
    llava.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    attach_pruners(llava, CONFIG)
    inputs = batch_of([9], [1], answers=[2])
    with prune_mode(llava, "soft"), pytest.raises(ValueError, match="use_reentrant"):
        llava(**inputs)
    with prune_mode(llava, "origin"):
        llava(**inputs)


def test_soft_masks_of_ones_are_the_unpruned_pass(llava):
    inputs = batch_of([9, 12], [1, 1])
    with torch.no_grad():
        stock = llava(**inputs).logits
        config = PruneConfig(pruning_layers=(1, 3), target_token_num=10, init_keep_logit=60.0, logit_cap=100.0)
        handle = attach_pruners(llava, config)
        with prune_mode(llava, "soft"):
            soft = llava(**inputs).logits
    assert (soft - stock)[handle.state.record.layout.valid].abs().max() < 1e-5


def test_the_unpruned_pass_restarts_from_the_recorded_prefix(llava):
    inputs = batch_of([9, 12], [1, 2])
    seen = {}
    hooks = [
        llava.get_model().layers[layer].register_forward_hook(lambda m, i, o, layer=layer: seen.update({layer: o[0]}))
        for layer in (2, 4)
    ]
    with torch.no_grad():
        llava(**inputs)
    for hook in hooks:
        hook.remove()
    stock = dict(seen)
    handle = attach_pruners(llava, PruneConfig(pruning_layers=(1, 3), target_token_num=10, pruner_dim=16))
    randomise_pruners(handle)
    handle.state.feature_layers = (2, 4)
    with prune_mode(llava, "soft"), torch.no_grad():
        llava(**inputs)
    real = handle.unpruned_features(handle.state.record)
    for layer in (2, 4):
        assert torch.equal(real[layer], stock[layer])
        assert not torch.equal(handle.state.record.features[layer], stock[layer])
