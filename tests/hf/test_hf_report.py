"""The report on Hugging Face's classes: FLOPs by torch's counter, bytes by the cache, the command."""

import json
from dataclasses import replace

import pytest
import torch
from counted import counted, pruned_at, total
from tiny_hf import KINDS, batch_of, randomise_pruners, tiny

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode
from llava_prune.compat import vision_modules
from llava_prune.convert import convert
from llava_prune.flops import DecoderShape, TowerShape, kv_bytes, projector_flops, tower_flops
from llava_prune.report import llm_flops, module_flops
from llava_prune.reporting.command import main
from llava_prune.reporting.costs import linear_widths
from llava_prune.reporting.measure import observe
from llava_prune.reporting.samples import HfInputs, make_batches, synthetic_samples
from llava_prune.reporting.shapes import SHAPES, ModelShape, build_hf
from llava_prune.sidecar import Sidecar, read_sidecar
from llava_prune.testbed.install import install_base

SETTINGS = PruneConfig(pruning_layers=(1, 3), target_sparsity=0.5, pruner_dim=16, pruner_heads=2)
TINY = ModelShape(
    32, 64, 6, 4, 80, vision_hidden=24, vision_intermediate=48, vision_layers=2, vision_heads=2, image=32, patch=8
)


@pytest.mark.parametrize("kind", [*KINDS, "dino"])
def test_every_line_is_what_the_torch_counter_counts(kind):
    model = tiny(kind)
    other = {"onevision": {"use_attn_residual": True}, "dino": {"use_question": False}}
    handle = attach_pruners(model, replace(SETTINGS, **other.get(kind, {})))
    randomise_pruners(handle)
    inputs = batch_of(model, [9], [1], padding_side="none")
    tower, projector = vision_modules(model)
    for mode in ("origin", "hard"):
        seen = observe(handle, mode, inputs)
        with prune_mode(model, mode):
            counts = counted(model, **inputs)
        report = last_report(model)
        assert total(counts, "model.language_model.layers.") == float(llm_flops(handle, report, mode == "hard"))
        if mode == "hard" and kind != "onevision":  # the residual runs in the decoder layer
            pruners = total(counts, "model.language_model.llava_pruners.layers.")
            assert pruners == float(module_flops(handle, report)["pruners"]) > 0
        assert counts["model.vision_tower"] == tower_flops(TowerShape.of(tower.config), seen.images)
        assert counts["model.multi_modal_projector"] == projector_flops(linear_widths(projector), seen.projector_rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["origin", "hard"])
def test_cache_bytes_computed_are_those_of_the_cache(kind, mode):
    model = tiny(kind)
    handle = attach_pruners(model, replace(SETTINGS, selection="topk"))
    randomise_pruners(handle)
    seen = observe(handle, mode, batch_of(model, [9], [1]))
    computed = float(kv_bytes(DecoderShape.of(handle.decoder.config), seen.rows, 4))
    assert seen.cache_bytes == computed > 0
    assert (seen.rows[0, -1] < seen.rows[0, 0]) == (mode == "hard")


def test_a_shape_takes_synthetic_samples():
    inputs = HfInputs(*build_hf(TINY, torch.device("cpu"), torch.float32, "sdpa"))
    (batch,) = make_batches(inputs, synthetic_samples(2), batch_size=2, text_tokens=11)
    handle = attach_pruners(inputs.model, replace(SETTINGS, selection="topk"))
    seen = observe(handle, "hard", batch)
    assert seen.report.text_tokens.tolist() == [11, 11] and seen.report.question_tokens.tolist() == [6, 6]
    assert seen.report.vision_tokens.tolist() == [16, 16] and seen.report.average_tokens.tolist() == [8, 8]


def test_the_7b_shape_has_its_parameters():
    model, _ = build_hf(SHAPES["llava-1.5-7b"], torch.device("meta"), torch.bfloat16, "sdpa")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(7.063, abs=0.001)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_command_on_a_shape(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", TINY)
    arguments = [
        "--shape",
        "llava-1.5-7b",
        "--prune_config",
        pruned_at(tmp_path, 1, 3, 5),
        "--average_tokens",
        8,
        "--number",
        1,
    ]
    arguments += ["--new_tokens", 2, "--warmup", 0, "--repeats", 1, "--json", tmp_path / "a.json"]
    main(list(map(str, arguments)))
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["model"]["weights"] == "random" and result["model"]["stack"] == "hf"
    assert result["modes"]["hard"]["average_tokens"] == 8


def test_command_on_a_converted_checkpoint(tmp_path):
    convert(install_base(tmp_path), tmp_path / "hf")
    arguments = [
        "--model",
        tmp_path / "hf",
        "--prune_config",
        pruned_at(tmp_path, 1, 3, 5),
        "--number",
        2,
        "--json",
        tmp_path / "a.json",
    ]
    main([*map(str, arguments), "--new_tokens", "2", "--warmup", "0", "--repeats", "1"])
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["model"]["stack"] == "hf" and list(result["modes"]) == ["origin", "hard"]
    origin, hard = result["modes"].values()
    assert (origin["average_tokens"], hard["average_tokens"], hard["text_tokens"]) == (144, 41, 64)
    assert hard["kv_bytes"]["computed"] == hard["kv_bytes"]["measured"] < origin["kv_bytes"]["measured"]


def test_questions_go_through_the_processor(tmp_path):
    from PIL import Image

    convert(install_base(tmp_path), tmp_path / "hf")
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    questions = ["what is in the top left?", "is there a red circle?"]
    lines = [json.dumps({"question_id": i, "image": "a.png", "text": text}) for i, text in enumerate(questions)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    arguments = [
        "--model",
        tmp_path / "hf",
        "--prune_config",
        pruned_at(tmp_path, 1, 3, 5),
        "--number",
        2,
        "--batch_size",
        2,
    ]
    arguments += ["--question-file", tmp_path / "q.jsonl", "--image-folder", tmp_path, "--json", tmp_path / "a.json"]
    main([*map(str, arguments), "--new_tokens", "2", "--warmup", "0", "--repeats", "1"])
    hard = json.loads((tmp_path / "a.json").read_text())["modes"]["hard"]
    assert hard["vision_tokens"] == 144 and len(set(hard["samples"]["text_tokens"])) == 2
    # padding of the shorter question is in the cache, and not in what its tokens need
    assert hard["kv_bytes"]["measured"] > hard["kv_bytes"]["computed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --model DIR or --shape"),
        (["--shape", "llava-1.5-7b", "--stack", "llava"], "the llava stack is not installed"),
        (["--model", "LLAVA"], "the llava stack is not installed"),
    ],
)
def test_what_can_not_work_is_said_in_one_line(arguments, message, tmp_path):
    arguments = [str(install_base(tmp_path)) if argument == "LLAVA" else argument for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_a_sidecar_ends_with_the_pruners(tmp_path):
    model = tiny()
    handle = attach_pruners(model, SETTINGS)
    inputs = batch_of(model, [9, 14], [1, 2])
    Sidecar(model, tmp_path / "r.jsonl")
    model.generate(**inputs, max_new_tokens=1)
    with handle.suspended():
        model.generate(**inputs, max_new_tokens=1)
    model.generate(**inputs, max_new_tokens=1)
    detach_pruners(model)
    model.generate(**inputs, max_new_tokens=1)
    assert [line["vision_tokens"] for line in read_sidecar(tmp_path / "r.jsonl")] == [16, 32] * 2
