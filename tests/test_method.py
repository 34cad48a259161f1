"""One call attaches pruners, a baseline, or nothing that decides; and what it refuses."""

import pytest
import torch
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode, save_pruners
from llava_prune.integrations.arguments import DEFAULTS, KeptTokens
from llava_prune.method import attach_method
from llava_prune.patch import find_handle
from llava_prune.sidecar import Sidecar, read_sidecar


def test_origin_needs_no_pruners_counts_tokens_and_is_the_stock_model(llava, tmp_path):
    inputs = batch_of([9, 7], [1, 1])
    with torch.no_grad():
        stock = llava(**inputs).logits
        attach_method(llava, mode="origin")
        assert torch.equal(llava(**inputs).logits, stock)
        assert last_report(llava).average_tokens.tolist() == [16, 16]
        Sidecar(llava, tmp_path / "r.jsonl")
        llava.generate(inputs["input_ids"][:1], images=inputs["images"][:1], max_new_tokens=2, do_sample=False)
    assert [line["average_tokens"] for line in read_sidecar(tmp_path / "r.jsonl")] == [16]
    detach_pruners(llava)
    assert find_handle(llava) is None


def test_pruners_come_with_mode_and_budget(tower_folder, tmp_path):
    trained = tiny_llava(tower_folder)
    randomise_pruners(attach_pruners(trained, PruneConfig(pruning_layers=(1, 3), target_token_num=10, pruner_dim=16)))
    save_pruners(trained, tmp_path)
    model = tiny_llava(tower_folder)
    handle = attach_method(model, str(tmp_path), "masked", average_tokens=8)
    with torch.no_grad():
        model(**batch_of([9], [1]))
    assert handle.state.mode == "masked" and 7 < last_report(model).average_tokens.item() <= 8


def test_masked_mode_is_charged_for_what_it_only_hides(llava, tmp_path):
    randomise_pruners(attach_pruners(llava, PruneConfig(pruning_layers=(0, 3), target_token_num=8, pruner_dim=16)))
    inputs = batch_of([9], [1])
    Sidecar(llava, tmp_path / "r.jsonl")
    for mode in ("origin", "masked", "hard"):
        with prune_mode(llava, mode):
            llava.generate(inputs["input_ids"], images=inputs["images"], max_new_tokens=1, do_sample=False)
    origin, masked, hard = read_sidecar(tmp_path / "r.jsonl")
    assert masked["tokens_per_layer"] == hard["tokens_per_layer"] != origin["tokens_per_layer"]
    assert hard["llm_flops"] < origin["llm_flops"] < masked["llm_flops"]


@pytest.mark.parametrize(
    "how", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_a_sample_has_one_line_however_many_sequences_are_returned(llava, tmp_path, how):
    randomise_pruners(attach_pruners(llava, PruneConfig(pruning_layers=(1, 3), target_token_num=8, pruner_dim=16)))
    inputs = batch_of([9, 9], [1, 2])
    Sidecar(llava, tmp_path / "r.jsonl")
    for _ in range(2):
        llava.generate(inputs["input_ids"], images=inputs["images"], max_new_tokens=2, **how)
    assert [line["vision_tokens"] for line in read_sidecar(tmp_path / "r.jsonl")] == [16, 32] * 2


def test_a_sample_counts_once_in_a_summary(llava):
    kept = KeptTokens(llava, {**DEFAULTS, "baseline": "fastv", "average_tokens": 8})
    inputs = batch_of([9, 9], [1, 2])
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 2}
    llava.generate(inputs["input_ids"], images=inputs["images"], **how)
    assert kept.summary() == "llava_prune: mode hard, 12.0 average tokens of 24.0 over 2 samples"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"mode": "hard"}, "mode 'hard' needs pruners"),
        ({"mode": "soft", "pruners": "a"}, "unknown mode 'soft': use one of origin, masked, hard"),
        ({"pruners": "a", "baseline": "fastv"}, "not both"),
        ({"baseline": "fastv"}, "needs average_tokens"),
        ({"mode": "origin", "average_tokens": 9}, "give one of them"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_attached(llava, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach_method(llava, **arguments)
    assert find_handle(llava) is None


def test_baselines_are_taken_with_their_mode(llava):
    handle = attach_method(llava, mode="masked", baseline="uniform", average_tokens=10)
    assert handle.state.mode == "masked"
    with torch.no_grad():
        llava(**batch_of([9], [1]))
    assert last_report(llava).average_tokens.item() == pytest.approx(10, abs=1)
