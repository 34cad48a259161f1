"""Bad settings are refused with what is wrong and what would be right."""

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
from tiny import tiny_llava

import llava_prune
from llava_prune import PruneConfig, attach_pruners
from llava_prune.config import preset_names
from llava_prune.schedules import cosine, schedule
from llava_prune.train import flag_fields, training_arguments_class


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one .*neither"),
        ({"target_token_num": 200, "target_sparsity": 0.5}, "exactly one .*both"),
        ({"target_token_num": 200, "pruning_layers": (12, 6)}, r"ascending.*\[6, 12\]"),
        ({"target_token_num": 200, "pruning_layers": ()}, "empty"),
        ({"target_token_num": 200, "pruning_layers": (-1, 6)}, "counted from 0"),
        ({"target_token_num": 200, "pruning_layers": 6}, "list"),
        ({"target_sparsity": 1.5}, r"\(0, 1\)"),
        ({"target_token_num": 200, "estimator": "gumbel"}, "gumbel_soft, gumbel_st, sigmoid_st"),
        ({"target_token_num": 200, "alignment": "wasserstein"}, "mean_var"),
        ({"target_token_num": 200, "pruner_dim": 100}, "pruner_dim 100 must be divisible"),
        ({"target_token_num": 200, "pruner_rank": 100}, "pruner_rank 100 must be divisible"),
        ({"target_token_num": 200, "max_keep": 0}, "min_keep"),
        ({"target_token_num": 200, "final_masked_ratio": 2}, r"\[0, 1\]"),
        ({"target_token_num": 200, "pruner_lr": 0}, "positive"),
        ({"target_token_num": float("inf")}, "target_token_num must be positive"),
        ({"target_token_num": 200, "pruner_lr": "fast"}, "pruner_lr must be a number, got 'fast'"),
        ({"target_token_num": 200, "pruner_rank": 0.5}, "pruner_rank must be a whole number"),
        ({"target_token_num": 200, "selection": "topk", "layer_shares": (1, 2, 4)}, "none larger"),
        ({"target_token_num": 200, "selection": "topk", "layer_shares": (2, 1)}, "each of the 3 pruning layers"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**values)


def test_unknown_key_names_the_nearest(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("target_token_num: 200\nprunning_layers: [6]\n")
    with pytest.raises(ValueError, match="'prunning_layers'.*'pruning_layers'"):
        PruneConfig.load(file)
    with pytest.raises(ValueError, match="no prune config 'avg12'.*avg128"):
        PruneConfig.load("avg12")
    file.write_text("just words")
    with pytest.raises(ValueError, match="key: value"):
        PruneConfig.load(file)


def test_yaml_and_json_round_trip(tmp_path):
    config = PruneConfig(target_sparsity=0.7, pruning_layers=(2, 4), max_keep=9, pruner_lr=1e-5)
    file = tmp_path / "config.json"
    file.write_text(config.dumps())
    assert PruneConfig.load(file) == config == PruneConfig.from_dict(json.loads(config.dumps()))
    file.write_text("target_token_num: 200\npruner_lr: 1e-5\nsparsity_weight: 1e3\nmax_keep: 9\n")  # text to YAML
    read = PruneConfig.load(file)
    assert (read.pruner_lr, read.sparsity_weight, read.max_keep) == (1e-5, 1000.0, 9)


@pytest.mark.parametrize("name", ["default", "avg192", "avg128", "avg64", "best"])
def test_presets_reach_their_budget_on_llava_1_5(name):
    config = PruneConfig.load(name)
    config.check_layers(32)
    config.check_budget(576, 32)
    config.disc_layer_indices(32)


def test_default_preset_holds_the_seed_values():
    config = PruneConfig.load("default")
    assert config.pruning_layers == (6, 12, 18) and config.target_token_num == 200
    assert config.pruner_dim == 512 and config.disc_layers == (-2, -5, -8)
    assert (config.temperature_start, config.temperature_end) == (0.99, 0.4)
    assert "mosaic" in preset_names()


def test_budget_under_the_floor_is_refused_with_the_floor(tower_folder):
    with pytest.raises(ValueError, match="floor of 108"):
        PruneConfig(target_token_num=100).check_budget(576, 32)
    with pytest.raises(ValueError, match="floor of 108"):
        PruneConfig(target_sparsity=0.9).check_budget(576, 32)
    with pytest.raises(ValueError, match="floor of 8 "):
        attach_pruners(tiny_llava(tower_folder), PruneConfig(pruning_layers=(3,), target_token_num=5))


def test_layers_out_of_range(tower_folder):
    with pytest.raises(ValueError, match="6 layers.*0..5"):
        attach_pruners(tiny_llava(tower_folder), PruneConfig(pruning_layers=(2, 6), target_token_num=10))
    with pytest.raises(ValueError, match=r"\[-5, -8\] lie outside 2..5"):
        PruneConfig(pruning_layers=(2,), target_token_num=10).disc_layer_indices(6)


def test_every_field_is_a_flag_and_an_override(tmp_path):
    from llava.train.train import TrainingArguments
    from transformers import HfArgumentParser

    names = ["config", "start", "baseline", *PruneConfig.field_names()]
    assert [name for name, *_ in flag_fields()] == [f"prune_{name}" for name in names]
    parser = HfArgumentParser(training_arguments_class(TrainingArguments))
    flags = (
        "--prune_config avg128 --prune_pruning_layers 2 5 --prune_target_sparsity 0.5 --prune_use_attn_residual True "
        "--prune_selection topk --prune_layer_shares 3 1.5"
    )
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags.split()])
    assert args.prune.pruning_layers == (2, 5) and args.prune.use_attn_residual is True
    assert args.prune.layer_shares == (3.0, 1.5)
    assert args.prune.target_sparsity == 0.5 and args.prune.target_token_num is None
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert pickle.loads(pickle.dumps(args)).prune == args.prune
    with pytest.raises(ValueError, match="use_reentrant"):
        type(args)(output_dir=str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True})


def test_schedules():
    config = PruneConfig(
        target_token_num=200, temperature_anneal_ratio=0.5, loss_weight_warmup_ratio=0.5, final_masked_ratio=0.25
    )
    start, middle, end = (schedule(config, step, 100) for step in (0, 50, 99))
    assert start.temperature == pytest.approx(0.99) and middle.temperature == end.temperature == pytest.approx(0.4)
    assert (start.adversarial_weight, middle.adversarial_weight) == (1.0, 10.0)
    assert start.task_weight == end.task_weight == 10.0
    assert start.guidance_weight == 0
    guided = PruneConfig(target_token_num=200, guidance_weight=4.0, guidance_ratio=0.5)
    assert [schedule(guided, step, 100).guidance_weight for step in (0, 25, 50, 99)] == pytest.approx([4, 2, 0, 0])
    kept = dataclasses.replace(guided, guidance_weight_end=2.0)
    assert [schedule(kept, step, 100).guidance_weight for step in (0, 25, 50, 99)] == pytest.approx([4, 3, 2, 2])
    with pytest.raises(ValueError, match="guidance_weight_end 5 must be at most guidance_weight, 4"):
        dataclasses.replace(guided, guidance_weight_end=5)
    alone = {"guidance_weight": 4.0, "guidance_ratio": 0.0, "guidance_only_ratio": 0.5, "selection": "topk"}
    begun = PruneConfig(target_token_num=200, **alone)
    values = [schedule(begun, step, 100) for step in (0, 49, 50, 89, 90)]
    assert [value.guidance_only for value in values] == [True, True, False, False, False]
    assert [value.guidance_weight for value in values] == [4, 4, 0, 0, 0]
    assert [value.mode for value in values] == ["soft"] * 4 + ["masked"]
    assert values[2].target_ease == 0 and values[2].temperature == pytest.approx(0.99), "the rest starts here"
    assert start.target_ease == 0 and middle.target_ease == pytest.approx(1)
    assert [schedule(config, step, 100).mode for step in (74, 75)] == ["soft", "masked"]
    assert cosine(1, 3, 0.25, 0.5) == pytest.approx(2)


def test_every_flag_says_what_it_is():
    from transformers import HfArgumentParser

    from llava_prune.train import flag_fields

    flags = dataclasses.make_dataclass("Flags", flag_fields(), bases=())
    assert "keeps 98 % of the tokens" in " ".join(HfArgumentParser(flags).format_help().split())


def test_readme_lists_every_field_and_every_public_name():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for item in dataclasses.fields(PruneConfig):
        assert re.search(rf"`{item.name}`", readme), f"{item.name} is not in the README"
        assert item.metadata["help"]
    for name in llava_prune.__all__:
        assert name in readme, f"{name} is not in the README"
        assert name == "__version__" or getattr(llava_prune, name).__doc__
