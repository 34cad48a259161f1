"""`python -m llava_prune report`: what it counts, measures and refuses."""

import json
from dataclasses import replace

import pytest
import torch
from counted import pruned_at
from PIL import Image
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode, save_pruners
from llava_prune.flops import DecoderShape, kv_bytes
from llava_prune.reporting.command import main
from llava_prune.reporting.costs import ratios, summarise
from llava_prune.reporting.measure import TIMES, measure, observe, percentile
from llava_prune.reporting.samples import LlavaInputs, make_batches, read_samples, synthetic_samples
from llava_prune.reporting.shapes import SHAPES, ModelShape, build_llava
from llava_prune.reporting.table import scaled, token_runs

SETTINGS = PruneConfig(pruning_layers=(1, 3), target_token_num=8, selection="topk", pruner_dim=16, pruner_heads=2)
TINY = ModelShape(
    32, 64, 6, 4, 80, vision_hidden=24, vision_intermediate=48, vision_layers=2, vision_heads=2, image=32, patch=8
)
CPU = torch.device("cpu")


def as_generate(batch):
    """`tiny.batch_of` as arguments of `generate`."""
    return {"inputs": batch["input_ids"], "attention_mask": batch["attention_mask"], "images": batch["images"]}


# ---- what is measured


def test_percentiles_lie_between_neighbours():
    assert percentile([3.0, 1.0, 2.0], 50) == 2 and percentile([1.0, 2.0], 50) == 1.5
    assert percentile([float(i) for i in range(11)], 90) == 9 and percentile([7.0], 90) == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@pytest.mark.parametrize("mode", ["origin", "masked", "hard"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache_bytes_computed_are_those_of_the_cache(tower_folder, mode, kv_heads):
    llava = tiny_llava(tower_folder, kv_heads=kv_heads)
    handle = attach_pruners(llava, SETTINGS)
    randomise_pruners(handle)
    seen = observe(handle, mode, as_generate(batch_of([9, 9], [1, 1])))
    computed = kv_bytes(DecoderShape.of(llava.config), seen.rows, 4)
    assert seen.cache_bytes == float(computed.sum()) > 0
    assert (seen.rows[:, -1] < 25).all() if mode == "hard" else (seen.rows == 25).all()


def test_cache_of_a_ragged_batch_holds_its_padding_and_filler_too(tower_folder):
    llava = tiny_llava(tower_folder, padding_side="left")
    handle = attach_pruners(llava, SETTINGS)
    seen = observe(handle, "hard", as_generate(batch_of([12, 7], [2, 1], padding_side="left")))
    dropped = seen.report.vision_tokens[:, None] - seen.report.tokens_per_layer
    assert dropped[0, -1] != dropped[1, -1]
    widest = (12 + 32 - dropped).max(0).values
    shape = DecoderShape.of(llava.config)
    assert seen.cache_bytes == 2 * float(kv_bytes(shape, widest, 4)) > float(kv_bytes(shape, seen.rows, 4).sum())


def test_origin_is_timed_without_pruners_and_they_come_back(llava):
    handle = attach_pruners(llava, SETTINGS)
    randomise_pruners(handle)
    inputs = batch_of([9], [1])
    with prune_mode(llava, "hard"), torch.no_grad():
        expected = llava(**inputs).logits
        kept = last_report(llava).kept[3][0]
    with handle.suspended():
        assert not any("forward" in layer.__dict__ for layer in llava.model.layers)
        assert not hasattr(llava.model, "llava_pruners")
    with prune_mode(llava, "hard"), torch.no_grad():
        torch.testing.assert_close(llava(**inputs).logits, expected, rtol=0, atol=0)
    assert last_report(llava).kept[3][0].tolist() == kept.tolist()


def test_measuring_leaves_no_hook_and_throws_the_warm_up_away(llava):
    handle = attach_pruners(llava, SETTINGS)
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in llava.named_modules()}
    batches = [as_generate(batch_of([9], [1])), as_generate(batch_of([5], [1]))]
    measured = measure(handle, ["origin", "hard"], batches, new_tokens=3, warmup=1, repeats=2)
    after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in llava.named_modules()}
    assert after == before
    for mode, result in measured.items():
        assert set(result.times) == set(TIMES) and all(len(times) == 4 for times in result.times.values())
        assert len(result.observations) == 2
        for i in range(4):
            times = {name: values[i] for name, values in result.times.items()}
            assert times["vision_tower"] + times["prefill"] < times["first_token"] and times["decode_token"] > 0
            assert (times["pruners"] == 0) if mode == "origin" else (0 < times["pruners"] < times["prefill"])


@pytest.mark.parametrize("layers", [(1, 3, 4), (0, 3, 4)])
def test_masked_mode_saves_no_flops_and_pays_for_pruners_on_every_token(llava, layers):
    handle = attach_pruners(llava, replace(SETTINGS, pruning_layers=layers))
    randomise_pruners(handle)
    measured = measure(handle, ["masked", "hard", "origin"], [as_generate(batch_of([9], [1]))], 2, 0, 1)
    masked, hard, origin = (summarise(handle, mode, result)["flops"] for mode, result in measured.items())
    assert masked["llm"] == origin["llm"] and masked["pruners"] > hard["pruners"] > 0 == origin["pruners"]
    assert hard["llm_and_modules"] == hard["llm"]["C"] + hard["pruners"]


def test_with_a_token_merger_origin_is_what_there_is_without_it(tower_folder):
    llava = tiny_llava(tower_folder)
    config = replace(SETTINGS, target_token_num=3, enable_token_merger=True, merger_tokens=9, merger_heads=2)
    handle = attach_pruners(llava, config)
    measured = measure(handle, ["origin", "hard"], [as_generate(batch_of([9], [1]))], 2, 0, 1)
    origin, hard = (summarise(handle, mode, result) for mode, result in measured.items())
    assert (origin["vision_tokens"], hard["vision_tokens"]) == (16, 9)
    assert hard["flops"]["token_merger"] > 0 == origin["flops"]["token_merger"]
    assert hard["flops"]["projector"] == origin["flops"]["projector"] * 9 / 16
    assert hard["flops"]["vision_tower"] == origin["flops"]["vision_tower"]


# ---- samples and shapes


def test_synthetic_batches_have_the_text_asked_for_around_the_picture():
    inputs = LlavaInputs(*build_llava(TINY, CPU, torch.float32, "sdpa"), "v1")
    batches = make_batches(inputs, synthetic_samples(3), batch_size=2, text_tokens=11)
    assert [len(batch["inputs"]) for batch in batches] == [2, 1]
    for batch in batches:
        assert (batch["inputs"] == -200).sum(-1).tolist() == [1] * len(batch["inputs"])
        assert (batch["inputs"][:, 5] == -200).all() and batch["inputs"].shape[1] == 12
        assert batch["images"].shape[1:] == (3, 32, 32) and batch["attention_mask"] is None
    handle = attach_pruners(inputs.model, SETTINGS)
    seen = observe(handle, "hard", batches[0])
    assert seen.report.text_tokens.tolist() == [11, 11] and seen.report.question_tokens.tolist() == [6, 6]
    assert seen.report.average_tokens.tolist() == [8, 8]


@pytest.mark.parametrize(("name", "billions"), [("llava-1.5-7b", 7.063), ("llava-1.5-13b", 13.351)])
def test_shapes_have_the_parameters_of_the_models_they_are_named_after(name, billions):
    model, _, _ = build_llava(SHAPES[name], torch.device("meta"), torch.bfloat16, "sdpa")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- the command


@pytest.fixture(scope="module")
def model(testbed):
    return testbed / "llava-mosaic-tiny"


@pytest.fixture(scope="module")
def pruners(model, tmp_path_factory):
    """Random pruners for the testbed's model."""
    from llava.model.builder import load_pretrained_model

    out = tmp_path_factory.mktemp("pruners")
    _, llava, _, _ = load_pretrained_model(str(model), None, model.name, device="cpu")
    config = PruneConfig(pruning_layers=(1, 3, 5), target_token_num=41, pruner_dim=16, pruner_heads=4)
    randomise_pruners(attach_pruners(llava.float(), config))
    save_pruners(llava, out)
    return out


QUICK = ["--new_tokens", "2", "--warmup", "0", "--repeats", "1"]


def test_command_on_a_checkpoint_with_pruners_and_questions(model, pruners, testbed, tmp_path, capsys):
    arguments = ["--model", model, "--pruners", pruners, "--average_tokens", 50, "--number", 4, "--batch_size", 2]
    arguments += ["--question-file", testbed / "test.jsonl", "--image-folder", testbed]
    arguments += ["--json", tmp_path / "report.json", "--plot", tmp_path / "report.png"]
    main([*map(str, arguments), *QUICK])
    result = json.loads((tmp_path / "report.json").read_text())
    assert list(result)[-1] == "ratios" and list(result["modes"]) == ["origin", "hard"]
    origin, hard = result["modes"]["origin"], result["modes"]["hard"]
    assert origin["tokens_per_layer"] == [144] * 8 and origin["average_tokens"] == 144
    assert len(hard["tokens_per_layer"]) == 8 and hard["tokens_per_layer"][0] == 144
    assert 49 < hard["average_tokens"] <= 50
    assert hard["average_tokens"] == pytest.approx(sum(hard["tokens_per_layer"]) / 8)
    assert hard["final_tokens"] == hard["tokens_per_layer"][-1]
    assert len(hard["samples"]["text_tokens"]) == 4 and 20 < hard["text_tokens"] < 100
    for figures in (origin, hard):
        assert set(figures["flops"]["llm"]) == {"A", "B", "C", "D"} == set(figures["flops"]["llm_vision_only"])
        assert figures["flops"]["vision_tower"] > 0 and figures["flops"]["projector"] > 0
        assert set(figures["times_ms"]) == set(TIMES) and figures["kv_bytes"]["measured"] > 0
        assert figures["peak_memory_bytes"] is None or figures["peak_memory_bytes"] > 1e7
    assert result["ratios"]["average_tokens"] == hard["average_tokens"] / 144
    ratio = hard["times_ms"]["prefill"]["median"] / origin["times_ms"]["prefill"]["median"]
    assert result["ratios"]["times_ms"]["prefill"]["median"] == ratio
    assert result["timing"]["calls"] == 2 and result["timing"]["clock"] == "time.perf_counter"
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size[0] > 1000
    printed = capsys.readouterr().out
    for text in (
        "origin",
        "hard",
        "ratio",
        "KV cache, measured",
        "time to first token",
        "text tokens",
        "Dynamic-LLaVA",
    ):
        assert text in printed


def test_command_with_untrained_pruners_and_synthetic_samples_in_a_batch(model, tmp_path):
    arguments = [
        "--model",
        model,
        "--prune_config",
        pruned_at(tmp_path, 1, 3, 5),
        "--number",
        2,
        "--batch_size",
        2,
        "--text_tokens",
        30,
    ]
    arguments += ["--mode", "masked", "--attn", "eager", "--json", tmp_path / "report.json"]
    main([*map(str, arguments), *QUICK])
    result = json.loads((tmp_path / "report.json").read_text())
    masked = result["modes"]["masked"]
    assert masked["average_tokens"] == 41 and masked["text_tokens"] == 30 and result["model"]["attention"] == "eager"
    for figures in result["modes"].values():
        assert figures["kv_bytes"]["computed"] == figures["kv_bytes"]["measured"] == 8 * 174 * 2 * 128 * 4
    assert result["ratios"]["kv_bytes"]["measured"] == 1 and result["ratios"]["flops"]["pruners"] is None


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
    main([*map(str, [*arguments, "--json", tmp_path / "report.json"]), *QUICK])
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["model"]["weights"] == "random" and result["model"]["stack"] == "llava"
    assert result["samples"]["source"] == "synthetic" and result["modes"]["hard"]["average_tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --model DIR or --shape"),
        (["--model", "MODEL", "--shape", "llava-1.5-7b"], "either --model DIR or --shape"),
        (["--model", "nowhere"], "no nowhere/config.json"),
        (["--model", "MODEL", "--prune_config", "mosaic", "--average_tokens", "17"], "floor of 18"),
        (["--model", "MODEL", "--pruners", "PRUNERS", "--average_tokens", "17"], "floor of 18"),
        (["--model", "MODEL"], "this decoder has 8 layers"),
        (["--model", "MODEL", "--prune_config", "no-such"], "no prune config 'no-such'"),
        (["--model", "MODEL", "--pruners", "nowhere"], "no prune_config.json in nowhere"),
        (["--model", "MODEL", "--pruners", "PRUNERS", "--prune_config", "mosaic"], "leave out --prune_config"),
        (["--model", "MODEL", "--stack", "hf"], "leave out --stack hf"),
        (["--shape", "llava-1.5-7b", "--stack", "hf"], "bash scripts/setup.sh hf"),
        (["--model", "MODEL", "--question-file", "q.jsonl"], "belong together"),
        (["--model", "MODEL", "--question-file", "q.jsonl", "--image-folder", "."], "no question file q.jsonl"),
        (["--shape", "llava-1.5-7b", "--question-file", "q", "--image-folder", "."], "knows no words"),
        (["--model", "MODEL", "--new_tokens", "1"], "--new_tokens must be at least 2"),
        (["--model", "MODEL", "--number", "3", "--batch_size", "2"], "multiple of --batch_size 2"),
        (["--model", "MODEL", "--device", "gpu"], "--device gpu: "),
        (["--model", "MODEL", "--json", "no/such/folder.json"], "no folder"),
        (["--model", "MODEL", "--plot", "plot.pdf"], "must end in .png"),
        (["--model", "MODEL", "--device", "cuda"], "no CUDA device of that number"),
    ],
)
def test_what_can_not_work_is_said_in_one_line(arguments, message, model, pruners, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"MODEL": str(model), "PRUNERS": str(pruners)}
    with pytest.raises(SystemExit) as stopped:
        main([places.get(argument, argument) for argument in arguments])
    assert message in str(stopped.value) and str(stopped.value).startswith("llava_prune report: ")


def test_question_files_are_checked_line_by_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"question_id": 1, "image": "a.png", "text": "what?"}
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, {**good, "image": "b.png"}, {"text": "no picture"}])))
    assert read_samples(path, tmp_path, 1)[0].question == "what?"
    path.write_text('{"image": "a.png", "text": "two\u2028lines?"}\n')
    assert read_samples(path, tmp_path, 1)[0].question == "two\u2028lines?"
    path.write_text("\n".join(map(json.dumps, [good, {**good, "image": "b.png"}])))
    with pytest.raises(FileNotFoundError, match="question 2: no picture"):
        read_samples(path, tmp_path, 2)
    path.write_text("\n".join(map(json.dumps, [good, {"text": "no picture"}])))
    with pytest.raises(ValueError, match="question 2: expected JSON with image and text"):
        read_samples(path, tmp_path, 2)
    with pytest.raises(ValueError, match="holds 2 questions, --number asks for 3"):
        read_samples(path, tmp_path, 3)
    path.write_text('{"image": "a.png", "te')
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        read_samples(path, tmp_path, 1)


def test_layers_are_grouped_where_no_mode_changes():
    assert token_runs([9, 9, 9, 9], [9, 4, 4, 2]) == [(0, 0, [9, 9]), (1, 2, [9, 4]), (3, 3, [9, 2])]


def test_units_suit_the_largest_value():
    assert [scaled([5e12, 1.0], 1000)[0], scaled([1023.0], 1024)[0], scaled([2048.0], 1024)[0]] == ["T", "", "Ki"]
    assert scaled([1536.0], 1024)[1](1536) == "1.5"


def test_ratios_follow_the_figures():
    origin = {"a": 2, "b": {"c": [4, 0]}, "samples": [1], "none": None}
    assert ratios({"a": 1, "b": {"c": [1, 5]}, "samples": [9], "none": None}, origin) == {
        "a": 0.5,
        "b": {"c": [0.25, None]},
        "none": None,
    }
