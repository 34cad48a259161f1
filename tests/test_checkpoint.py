"""Pruner-only checkpoints: what is saved comes back, and nothing wrong is loaded without a word."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save_file
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, load_pruners, prune_mode, save_pruners
from llava_prune.baselines import attach_baseline
from llava_prune.checkpoint import CONFIG, WEIGHTS, write_atomically
from llava_prune.patch import find_handle

SETTINGS = PruneConfig(pruning_layers=(1, 3), target_token_num=10, pruner_dim=16, pruner_heads=4)


@pytest.fixture
def saved(llava, tmp_path):
    llava.config._name_or_path = "somebody/llava-v1.5-7b"
    with attach_pruners(llava, SETTINGS) as handle:
        randomise_pruners(handle)
        save_pruners(llava, tmp_path)
    return tmp_path


def test_a_loaded_model_prunes_as_the_saved_one(llava, tower_folder, tmp_path):
    inputs = batch_of([9, 12], [1, 1])
    randomise_pruners(attach_pruners(llava, SETTINGS))
    save_pruners(llava, tmp_path)
    with prune_mode(llava, "hard"), torch.no_grad():
        expected = llava(**inputs).logits
    other = tiny_llava(tower_folder)
    load_pruners(other, tmp_path, mode="hard")
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, expected)
    assert torch.equal(last_report(other).tokens_per_layer, last_report(llava).tokens_per_layer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_initialisation_does_not_rest_on_torch_defaults(tower_folder, monkeypatch):
    """LLaVA's evaluation turns the reset_parameters of Linear and LayerNorm into no-ops, process-wide."""
    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: [p.data.fill_(1e30) for p in self.parameters()])
    model = tiny_llava(tower_folder)
    handle = attach_pruners(
        model,
        PruneConfig(
            pruning_layers=(1,), target_token_num=8, enable_token_merger=True, merger_tokens=9, merger_heads=4
        ),
    )
    for name, parameter in handle.pruners.named_parameters():
        assert parameter.abs().max() < 10, name


def test_another_base_model_is_refused(saved, tower_folder):
    shallow, wide, renamed = tiny_llava(tower_folder, layers=5), tiny_llava(tower_folder, hidden=64), None
    for model, message in ((shallow, "decoder layers 6.*has 5"), (wide, "hidden size 32.*has 64")):
        with pytest.raises(ValueError, match=message):
            load_pruners(model, saved)
        assert find_handle(model) is None
    renamed = tiny_llava(tower_folder)
    renamed.config._name_or_path = "/models/llava-v1.6-7b"
    with pytest.raises(ValueError, match="allow_other_base"):
        load_pruners(renamed, saved)
    load_pruners(renamed, saved, allow_other_base=True)


@pytest.mark.parametrize(
    "name", ["/models/llava-v1.5-7b/", "llava-hf/llava-1.5-7b-hf", "x/llava-v1.5-7b/checkpoint-9"]
)
def test_the_same_base_under_its_usual_names_is_accepted(saved, tower_folder, name):
    model = tiny_llava(tower_folder)
    model.config._name_or_path = name
    load_pruners(model, saved)


def test_missing_and_damaged_files(saved, llava, tmp_path):
    with pytest.raises(FileNotFoundError, match="finished training"):
        load_pruners(llava, tmp_path / "nowhere")
    weights = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_pruners(llava, saved)
    broken = load(weights)
    next(iter(broken.values())).fill_(torch.nan)
    save_file(broken, saved / WEIGHTS)
    with pytest.raises(ValueError, match="damaged, since .* is not finite"):
        load_pruners(llava, saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_pruners(llava, saved)
    (saved / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_pruners(llava, saved)
    assert find_handle(llava) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prune_config": None}, "prune_config is None"),
        ({"prune_config": []}, r"prune_config is \[\]"),
        ({"base_model": None}, "NoneType"),
        ({"base_model": {"name": None, "hidden_size": 32, "num_layers": 6}}, "base_model.name is None"),
        ({"base_model": {"name": "a", "hidden_size": "32", "num_layers": 6}}, "base_model.hidden_size is '32'"),
        ({"keep_fractions": [0.5]}, "1 keep_fractions for 2 pruning layers"),
        ({"keep_fractions": 0.5}, "float"),
    ],
)
def test_a_description_of_another_shape_is_damaged(saved, llava, change, message):
    description = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**description, **change}))
    with pytest.raises(ValueError, match=f"{CONFIG} is damaged.*{message}"):
        load_pruners(llava, saved)
    assert find_handle(llava) is None


def test_a_description_that_is_no_text_is_damaged(saved, llava):
    (saved / CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged.*copy it again"):
        load_pruners(llava, saved)


def test_another_format_is_refused_by_its_number(saved, llava):
    description = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**description, "format_version": 1}))
    with pytest.raises(ValueError, match="is of format 1, this llava_prune reads format 4"):
        load_pruners(llava, saved)
    assert find_handle(llava) is None


def test_pruners_from_before_there_was_a_norm_are_read_without_one(llava, tmp_path):
    config = replace(SETTINGS, pruner_qk_norm=False)
    with attach_pruners(llava, config):
        save_pruners(llava, tmp_path)
    description = json.loads((tmp_path / CONFIG).read_text())
    del description["prune_config"]["pruner_qk_norm"]
    (tmp_path / CONFIG).write_text(json.dumps(description))
    assert load_pruners(llava, tmp_path).config == config


@pytest.mark.parametrize(
    "average,message", [(float("inf"), "positive number"), (float("nan"), "positive number"), (17, "prunes nothing")]
)
def test_budgets_that_are_none_are_refused(saved, llava, average, message):
    with pytest.raises(ValueError, match=message):
        load_pruners(llava, saved, average_tokens=average)
    with pytest.raises(ValueError, match=message):
        attach_baseline(llava, "uniform", average)
    assert find_handle(llava) is None


def test_an_unknown_mode_attaches_nothing(saved, llava):
    with pytest.raises(ValueError, match="unknown mode 'Hard'"):
        load_pruners(llava, saved, mode="Hard")
    assert find_handle(llava) is None


def test_pruners_that_are_lost_are_not_written_over_others(saved, llava):
    before = (saved / WEIGHTS).read_bytes()
    load_pruners(llava, saved).scorers[1].pruner.compress.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.compress.weight is not finite.* lower pruner_lr"):
        save_pruners(llava, saved)
    assert (saved / WEIGHTS).read_bytes() == before


def test_a_weight_that_does_not_fit_is_never_dropped(saved, llava):
    from safetensors.torch import load_file, save_file

    whole = load_file(saved / WEIGHTS)
    for change in ("missing", "unexpected", "shape"):
        weights = dict(whole)
        if change == "missing":
            weights.pop("layers.1.joint_logits.bias")
        elif change == "unexpected":
            weights["layers.9.joint_logits.bias"] = torch.zeros(2)
        else:
            weights["layers.1.joint_logits.bias"] = torch.zeros(3)
        save_file(weights, saved / WEIGHTS)
        with pytest.raises(ValueError, match="joint_logits.bias"):
            load_pruners(llava, saved)
        assert find_handle(llava) is None


def test_saving_never_leaves_half_a_file(saved, llava, monkeypatch):
    before = (saved / WEIGHTS).read_bytes()
    randomise_pruners(attach_pruners(llava, SETTINGS), seed=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pruners(llava, saved)
    assert (saved / WEIGHTS).read_bytes() == before
    assert json.loads((saved / CONFIG).read_text())["prune_config"] == SETTINGS.to_dict()
    assert sorted(path.name for path in saved.iterdir()) == sorted([WEIGHTS, CONFIG]), "nor a file of another name"


def test_writers_of_one_file_do_not_break_each_other(tmp_path):
    path = tmp_path / "cell.json"

    def write(temporary):
        temporary.write_text("first to begin, last to end")
        write_atomically(path, lambda other: other.write_text("another's"))
        assert path.read_text() == "another's"

    write_atomically(path, write)
    assert path.read_text() == "first to begin, last to end" and list(tmp_path.iterdir()) == [path]
