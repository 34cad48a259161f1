"""Adaptation: tokens are removed while LoRA learns, pruners stay as they are, budgets are drawn anew."""

import json

import pytest
import torch
from launch import train
from law import randomise_pruners
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import batch_of, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode
from llava_prune.adaptation import check_what_learns, drawn_budget, kept_metrics, of_baseline, without_adapters
from llava_prune.baselines import attach_baseline

LAYERS = (0, 3)
EXACT = {"pruning_layers": LAYERS, "selection": "topk", "target_token_num": 6, "pruner_dim": 16}
ADAPTING = {**EXACT, "train_pruners": False, "token_num_range": (3, 12)}


def adapted(tower_folder, **changes):
    lora = LoraConfig(r=4, target_modules=r"model\.layers\..*[qv]_proj", init_lora_weights=False)  # not in the tower
    model = get_peft_model(tiny_llava(tower_folder), lora).eval()
    handle = attach_pruners(model, PruneConfig(**{**ADAPTING, **changes}))
    randomise_pruners(handle)
    return model, handle


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_step_removes_what_the_drawn_budget_leaves_no_room_for(tower_folder, checkpointing):
    """Loss, gradient and what the adversary reads are those of masked mode, outside training: no way through masks."""
    model, handle = adapted(tower_folder)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    inputs = batch_of([9, 12, 6, 8], [1, 1, 2, 0], answers=[2, 3, 2, 1])
    handle.state.feature_layers, handle.state.target_token_num = (2, 4), 4.5
    found = {}
    for mode in ("masked", "hard"):
        model.train(mode == "hard")
        with prune_mode(model, mode):
            loss = model(**inputs, use_cache=False).loss
            features, average = handle.state.record.features, last_report(model).average_tokens.tolist()
            gradients = torch.autograd.grad(loss, adapters, allow_unused=True)
        found[mode] = (loss, features, [g for g in gradients if g is not None], average)
    text = handle.state.record.layout.valid & ~handle.state.record.layout.vision
    (loss, features, gradients, average), (others_loss, others, others_gradients, _) = found["hard"], found["masked"]
    assert average[:2] == [4.5, 4.5] and average[2:] == [9, 0]
    torch.testing.assert_close(loss, others_loss)
    for layer in (2, 4):
        torch.testing.assert_close(features[layer][text], others[layer][text], atol=1e-5, rtol=1e-4)
    assert len(gradients) == len(others_gradients) > 0
    for gradient, other in zip(gradients, others_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_the_aim_is_the_base_as_it_was(tower_folder):
    inputs = batch_of([9, 12], [1, 2], answers=[2, 3])
    model, handle = adapted(tower_folder)
    handle.state.feature_layers = (3,)
    with model.disable_adapter(), handle.suspended():
        expected = model(**inputs, output_hidden_states=True).hidden_states[4]
    with prune_mode(model, "hard"):
        model(**inputs, use_cache=False)
    record = handle.state.record
    with without_adapters(model):
        found = handle.unpruned_features(record)[3]
    torch.testing.assert_close(found[record.layout.valid], expected[record.layout.valid], atol=1e-5, rtol=1e-4)
    with_adapters = handle.unpruned_features(record)[3]
    assert (with_adapters - found)[record.layout.valid].abs().max() > 1e-3


def test_budgets_are_drawn_from_all_of_the_range():
    config = PruneConfig(**ADAPTING)
    torch.manual_seed(0)
    drawn = torch.tensor([drawn_budget(config) for _ in range(2000)])
    assert drawn.min() >= 3 and drawn.max() <= 12
    assert (drawn < 6).float().mean() == pytest.approx(0.5, abs=0.05), "as many in every octave"
    assert drawn_budget(PruneConfig(**EXACT, train_pruners=False)) is None
    assert drawn_budget(PruneConfig(**{**ADAPTING, "train_pruners": True})) is None, "pruners learn at their target"


def test_there_must_be_pruners_and_something_that_learns():
    config = PruneConfig(**ADAPTING)
    with pytest.raises(ValueError, match="give trained ones with --prune_start"):
        check_what_learns(config, None, None, True)
    with pytest.raises(ValueError, match="nothing would learn; add --lora_enable True"):
        check_what_learns(config, "pruners", None, False)
    check_what_learns(config, "pruners", None, True)
    check_what_learns(PruneConfig(**ADAPTING, train_base=True), "pruners", None, False)
    with pytest.raises(ValueError, match="not both"):
        check_what_learns(config, "pruners", "fastv", True)
    check_what_learns(config, None, "fastv", True)


def test_a_baseline_keeps_the_target_and_nothing_is_aligned():
    config = of_baseline(PruneConfig(**{**ADAPTING, "max_keep": None}))
    assert (config.selection, config.target_token_num, config.token_num_range) == ("topk", 6, None)
    assert (config.alignment, config.train_pruners) == ("none", False)
    with pytest.raises(ValueError, match="set target_token_num"):
        of_baseline(PruneConfig(target_sparsity=0.5))


def test_the_share_that_a_baseline_keeps_is_of_what_there_was(tower_folder):
    model = tiny_llava(tower_folder)
    inputs = batch_of([9, 12, 6], [1, 2, 0], answers=[2, 3, 2])
    for name in ("divprune", "fastv"):
        with torch.no_grad(), attach_baseline(model, name, 6) as handle:
            model(**inputs, use_cache=False)
            share = kept_metrics(handle.state.record, handle.num_layers)["prune/kept_share"]
        assert share.item() == pytest.approx(6 / handle.vision_tokens, abs=0.05), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_num_range": (12, 3)}, "the fewest and the most average tokens"),
        ({"token_num_range": (3,)}, "the fewest and the most average tokens"),
        ({"token_num_range": (0, 3)}, "above 0"),
        ({"selection": "threshold"}, "set selection to 'topk'"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**{**ADAPTING, **changes})


def test_the_low_end_must_be_above_the_floor(tower_folder):
    with pytest.raises(ValueError, match="floor"):
        attach_pruners(tiny_llava(tower_folder), PruneConfig(**{**ADAPTING, "pruning_layers": (1, 3)}))


@pytest.mark.distributed
def test_lora_learns_to_answer_from_what_trained_pruners_keep(testbed, tmp_path):
    guided = {"prune_config": "mosaic_guided", "prune_pruner_lr": 1e-3}
    train(testbed, tmp_path / "guided", processes=1, stage=None, steps=2, **guided)
    flags = {**guided, "prune_start": tmp_path / "guided", "prune_train_pruners": False, "learning_rate": 1e-3}
    flags |= {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
    for stage in (2, 3):
        out = tmp_path / f"llava-lora-{stage}"
        checkpoints = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": stage == 3}
        checkpoints["prune_alignment"] = "gan" if stage == 2 else "kl"
        logs = train(testbed, out, stage=stage, steps=3, **flags, **checkpoints)
        assert all(13 / 144 <= entry["prune/kept_share"] <= 72 / 144 for entry in logs)
        assert all({"loss/task", "loss/adversarial"} <= entry.keys() for entry in logs)
        assert all(("gan/d_loss" in entry) == (stage == 2) for entry in logs)
        assert not any("loss/sparsity" in entry or "loss/guidance" in entry for entry in logs)
        begun, ended = (load_file(folder / "pruners.safetensors") for folder in (tmp_path / "guided", out))
        assert begun.keys() == ended.keys() and all(torch.equal(begun[name], ended[name]) for name in begun)
        adapter = load_file(out / "adapter_model.safetensors")
        assert any(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)
        assert not json.loads((out / "prune_config.json").read_text())["prune_config"]["train_pruners"]
    resumed = train(testbed, out, stage=3, steps=4, **flags, **checkpoints)
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4]
    assert resumed[2]["loss"] == pytest.approx(logs[2]["loss"], rel=1e-4)
    adapter = (out / "adapter_model.safetensors").read_bytes()
    finished = train(testbed, out, stage=3, steps=4, **flags, **checkpoints)
    assert [entry["step"] for entry in finished] == [1, 2, 3, 4], "a finished run was trained further"
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    others = tmp_path / "others"
    others.mkdir()
    (others / "prune_config.json").write_bytes((tmp_path / "guided/prune_config.json").read_bytes())
    save_file({name: value + 0.1 for name, value in begun.items()}, others / "pruners.safetensors")
    with pytest.raises(AssertionError, match="is adapted to other pruners than those of prune_start"):
        train(testbed, out, processes=1, stage=3, steps=5, **{**flags, "prune_start": others}, **checkpoints)


@pytest.mark.distributed
@pytest.mark.parametrize("baseline", ["divprune", "fastv"])
def test_lora_learns_to_answer_from_what_a_baseline_keeps(testbed, tmp_path, baseline):
    flags = {"prune_baseline": baseline, "prune_config": "mosaic_guided", "prune_target_token_num": 48}
    flags |= {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3}
    out = tmp_path / "llava-lora"
    logs = train(testbed, out, stage=2, steps=3, **flags, save_strategy="steps", save_steps=2)
    assert all(entry["prune/kept_share"] == pytest.approx(48 / 144, abs=0.01) for entry in logs)
    assert not any("loss/adversarial" in entry or "loss/guidance" in entry for entry in logs)
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)
    assert not list(out.rglob("pruners.safetensors")), "there are none"
    resumed = train(testbed, out, stage=2, steps=4, **flags, save_strategy="steps", save_steps=2)
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4]
    assert resumed[2]["loss"] == pytest.approx(logs[2]["loss"], rel=1e-4)
    with pytest.raises(AssertionError, match=rf"is adapted to {baseline} at 48 tokens, not to {baseline} at 60"):
        other = {**flags, "prune_target_token_num": 60}
        train(testbed, out, processes=1, stage=2, steps=5, **other, save_strategy="steps", save_steps=2)
