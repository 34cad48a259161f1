"""One checkpoint at several budgets: exact counts, in masked and hard mode alike."""

import json

import pytest
import torch
from tiny_hf import batch_of, randomise_pruners, tiny

from llava_prune import PruneConfig, attach_pruners, last_report, load_pruners, prune_mode, save_pruners
from llava_prune.budget import average_of, layer_counts

LAYERS = (1, 3, 4)


@pytest.fixture
def saved(tmp_path):
    model = tiny("llava")
    config = PruneConfig(pruning_layers=LAYERS, target_token_num=12, pruner_dim=16, pruner_heads=4)
    with attach_pruners(model, config) as handle:
        randomise_pruners(handle)
        handle.state.keep_fractions = (0.8, 0.5, 0.2)
        save_pruners(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("average", [4, 7.5, 10, 16])
def test_every_sample_has_exactly_the_budget(saved, average):
    model, folder = saved
    batch = batch_of(model, [9, 14, 7, 11], [1, 1, 0, 2])
    expected = layer_counts(16, average, LAYERS, 6, (0.8, 0.5, 0.2))
    double = layer_counts(32, 2 * average, LAYERS, 6, (0.8, 0.5, 0.2))
    logits = {}
    with load_pruners(model, folder, average_tokens=average) as handle, torch.no_grad():
        for mode in ("masked", "hard"):
            with prune_mode(model, mode):
                logits[mode] = model(**batch).logits
            report = last_report(model)
            counts = [tuple(len(report.kept[layer][row]) for layer in LAYERS) for row in range(4)]
            assert counts == [expected, expected, (0, 0, 0), double]
            assert report.average_tokens[0].item() == pytest.approx(average_of(expected, 16, LAYERS, 6))
            assert average - 1 < report.average_tokens[0] <= average
        text = handle.state.record.layout.text
    torch.testing.assert_close(logits["masked"][text], logits["hard"][text], atol=1e-4, rtol=0)


def test_layer_shares_are_kept_at_every_budget_unless_a_threshold_learned_others(tmp_path):
    model = tiny("llava")
    settings = {"pruning_layers": LAYERS, "target_token_num": 9, "pruner_dim": 16, "pruner_heads": 4}
    with attach_pruners(model, PruneConfig(**settings, selection="topk", layer_shares=(4, 2, 1))) as handle:
        save_pruners(model, tmp_path)
        handle.state.keep_fractions = (0.5, 0.5, 0.5)
        assert handle.layer_budget(16, 1) == layer_counts(16, 9, LAYERS, 6)
    for average in (6, 9):
        with load_pruners(model, tmp_path, average_tokens=average), torch.no_grad():
            model(**batch_of(model, [9], [1]))
            counts = tuple(len(kept[0]) for kept in last_report(model).kept.values())
        assert counts == layer_counts(16, average, LAYERS, 6, (4, 2, 1))


@pytest.mark.parametrize(("average", "floor"), [(2, "2.66667"), (3, "3.5")])
def test_a_budget_under_the_floor_is_refused_and_leaves_the_model_alone(saved, average, floor):
    model, folder = saved
    with pytest.raises(ValueError, match=f"under the floor of {floor}"):
        load_pruners(model, folder, average_tokens=average)
    assert "forward" not in model.__dict__ and not hasattr(model.model.language_model, "llava_pruners")


def test_without_average_tokens_the_threshold_decides(saved):
    model, folder = saved
    with load_pruners(model, folder) as handle:
        assert handle.config.selection == "threshold" and handle.state.keep_fractions == (0.8, 0.5, 0.2)
        save_pruners(model, folder)
    assert json.loads((folder / "prune_config.json").read_text())["keep_fractions"] == [0.8, 0.5, 0.2]


def test_a_checkpoint_of_before_there_were_fractions_shares_evenly(saved):
    model, folder = saved
    path = folder / "prune_config.json"
    description = json.loads(path.read_text())
    del description["keep_fractions"], description["prune_config"]["selection"]
    path.write_text(json.dumps(description))
    with load_pruners(model, folder, average_tokens=9), torch.no_grad():
        model(**batch_of(model, [9], [1]))
        counts = [len(kept[0]) for kept in last_report(model).kept.values()]
    assert max(counts) - min(counts) <= 1


def test_anyres_images_of_any_size_share_one_budget():
    model = tiny("next")
    config = PruneConfig(pruning_layers=LAYERS, target_sparsity=0.6, selection="topk", pruner_dim=16, pruner_heads=4)
    with attach_pruners(model, config) as handle, torch.no_grad(), prune_mode(model, "hard"):
        randomise_pruners(handle)
        model(**batch_of(model, [9, 12], [1, 2]))
        report = last_report(model)
    budget = 0.4 * report.vision_tokens
    assert report.vision_tokens[0] != report.vision_tokens[1]
    assert ((report.average_tokens <= budget + 1e-4) & (report.average_tokens > budget - 1)).all()
