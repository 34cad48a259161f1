"""Attaching pruners and taking them off again."""

import io

import pytest
import torch
from law import settings
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import attach_pruners, detach_pruners, prune_mode
from llava_prune.baselines import attach_baseline


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_detach_leaves_nothing(llava):
    inputs = batch_of([9, 14, 7, 11], [1, 0, 2, 1])
    stock = logits(llava, inputs)
    keys, names = set(llava.state_dict()), {name for name, _ in llava.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in llava.named_modules()}
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in llava.named_modules()}
    randomise_pruners(attach_pruners(llava, settings(enable_token_merger=True, merger_tokens=8, merger_heads=4)))
    with prune_mode(llava, "hard"):
        logits(llava, inputs)
    detach_pruners(llava)
    assert torch.equal(logits(llava, inputs), stock)
    assert set(llava.state_dict()) == keys and {name for name, _ in llava.named_modules()} == names
    assert {name: set(module.__dict__) for name, module in llava.named_modules()} == attributes
    assert {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in llava.named_modules()} == hooks
    with pytest.raises(ValueError, match="attach_pruners"):
        detach_pruners(llava)


def test_handle_is_a_context_and_attaching_twice_is_refused(llava):
    with attach_pruners(llava, settings()), pytest.raises(ValueError, match="detach_pruners"):
        attach_pruners(llava, settings())
    assert "forward" not in llava.get_model().layers[1].__dict__


def test_what_is_bound_is_not_pickled(llava):
    with attach_pruners(llava, settings()), pytest.raises(ValueError, match="save the pruners with save_pruners"):
        torch.save(llava, io.BytesIO())
    torch.save(llava, io.BytesIO())


def test_a_second_model_is_left_alone(tower_folder, llava):
    other = tiny_llava(tower_folder, seed=1)
    inputs = batch_of([9], [1])
    before = logits(other, inputs)
    randomise_pruners(attach_pruners(llava, settings()))
    with prune_mode(llava, "hard"):
        assert torch.equal(logits(other, inputs), before)


def test_modes_and_models_are_checked(llava):
    with pytest.raises(ValueError, match="attach_pruners"), prune_mode(llava, "hard"):
        pass
    attach_pruners(llava, settings())
    with pytest.raises(ValueError, match="origin, soft, masked, hard"), prune_mode(llava, "fast"):
        pass
    with pytest.raises(ValueError, match="no Llama decoder"):
        attach_pruners(torch.nn.Linear(2, 2), settings())


def test_handles_say_what_they_keep(llava):
    with attach_pruners(llava, settings(pruning_layers=(1, 3))) as handle, prune_mode(llava, "hard"):
        shown = "PruneHandle(mode='hard', pruning_layers=(1, 3), target_sparsity=0.5, selection='threshold')"
        assert repr(handle) == shown
    with attach_baseline(llava, "fastv", 6) as handle:
        assert repr(handle) == "BaselineHandle(mode='hard', method=FastV, average_tokens=6)"
