"""LLaVA's own evaluation program with pruners attached, without CUDA, and what is made of its output."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from launch import ROOT, environment
from PIL import Image
from tiny import randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, save_pruners
from llava_prune.cuda_to_cpu import CudaToCpu
from llava_prune.run import main as run
from llava_prune.run import pruned_loading
from llava_prune.sidecar import read_sidecar

SETTINGS = PruneConfig(pruning_layers=(1, 3, 5), target_token_num=41, pruner_dim=16, pruner_heads=4)


@pytest.fixture(scope="module")
def answered(testbed, tmp_path_factory):
    """Random pruners for the testbed's model, and its test questions answered in both modes at once."""
    from llava.model.builder import load_pretrained_model

    out = tmp_path_factory.mktemp("out")
    base = testbed / "llava-mosaic-tiny"
    _, model, _, _ = load_pretrained_model(str(base), None, "llava-mosaic-tiny", device="cpu")
    randomise_pruners(attach_pruners(model.float(), SETTINGS))
    save_pruners(model, out)
    running = {}
    for mode in ("origin", "hard"):
        arguments = ["run", "--pruners", out, "--mode", mode, "--report", out / f"{mode}.report.jsonl"]
        arguments += ["-m", "llava.eval.model_vqa_loader", "--model-path", base, "--image-folder", testbed]
        arguments += ["--question-file", testbed / "test.jsonl", "--answers-file", out / f"{mode}.jsonl"]
        command = [
            sys.executable,
            "-m",
            "llava_prune",
            *map(str, arguments),
            "--temperature",
            "0",
            "--conv-mode",
            "v1",
        ]
        running[mode] = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    for process in running.values():
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    return out


def test_answers_keep_llavas_format_and_the_sidecar_has_a_line_each(answered, testbed):
    questions = [json.loads(line) for line in (testbed / "test.jsonl").read_text().splitlines()]
    for mode in ("origin", "hard"):
        answers = [json.loads(line) for line in (answered / f"{mode}.jsonl").read_text().splitlines()]
        report = [json.loads(line) for line in (answered / f"{mode}.report.jsonl").read_text().splitlines()]
        assert [a["question_id"] for a in answers] == [q["question_id"] for q in questions]
        assert set(answers[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert len(report) == len(questions) and {line["mode"] for line in report} == {mode}
        for line in report:
            assert line["average_tokens"] == pytest.approx(sum(line["tokens_per_layer"]) / 8)
            if mode == "hard":
                assert [len(line["kept"][k]) for k in ("1", "3", "5")] == line["tokens_per_layer"][1:6:2]
            else:
                assert line["average_tokens"] == 144
    assert min(line["average_tokens"] for line in report) < 144


def test_origin_answers_are_those_of_llava_alone(answered, testbed):
    """The wrapped program and the stock model in this process give the same words."""
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    base = testbed / "llava-mosaic-tiny"
    tokenizer, model, processor, _ = load_pretrained_model(str(base), None, "llava-mosaic-tiny", device="cpu")
    model.float().get_vision_tower().float()
    questions = [json.loads(line) for line in (testbed / "test.jsonl").read_text().splitlines()][:6]
    answers = [json.loads(line)["text"] for line in (answered / "origin.jsonl").read_text().splitlines()]
    for question, answer in zip(questions, answers, strict=False):
        conversation = conv_templates["v1"].copy()
        conversation.append_message(conversation.roles[0], "<image>\n" + question["text"])
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
        with Image.open(testbed / question["image"]) as picture:
            pixels = process_images([picture.convert("RGB")], processor, model.config)
        output = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=16)
        assert tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip() == answer


def test_results_table_json_and_picture(answered, testbed):
    command = [sys.executable, "-m", "llava_prune.testbed.results", "--data", str(testbed), "--out", str(answered)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "origin" in done.stdout and "hard" in done.stdout and "average tokens" in done.stdout
    results = json.loads((answered / "results.json").read_text())
    assert results["vision_tokens"] == 144 and results["questions"] == 24
    assert results["origin"]["accuracy"] >= 0.9 and results["origin"]["flops_ratio"] == 1
    hard = results["hard"]
    assert {"accuracy", "agreement", "average_tokens", "tokens_per_pruning_layer", "flops_ratio"} <= hard.keys()
    assert len(hard["tokens_per_pruning_layer"]) == 3 and 0 < hard["flops_ratio"] < 1
    with Image.open(answered / "kept_tokens.png") as picture:
        assert picture.size[0] > 500


def test_unusable_pruners_are_named_before_anything_is_loaded(answered, tmp_path):
    command = [sys.executable, "-m", "llava_prune", "run", "--pruners", str(tmp_path), "-m", "llava.eval.model_vqa"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "prune_config.json" in done.stderr and "Traceback" not in done.stderr


def test_a_program_finds_what_lies_beside_it(tmp_path):
    (tmp_path / "sibling.py").write_text("FOUND = 'beside it'\n")
    (tmp_path / "program.py").write_text("import sibling, sys\nprint(sibling.FOUND, sys.argv[1:])\n")
    arguments = ["run", "--mode", "origin", "-m", str(tmp_path / "program.py"), "--its", "own"]
    command = [sys.executable, "-m", "llava_prune", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["beside it ['--its', 'own']"], done.stderr
    assert done.returncode and "so nothing was attached to any" in done.stderr, "it loads no model"


def test_what_can_not_run_is_said_before_anything_is_loaded(tmp_path):
    for words, message in (
        (["-m", str(tmp_path / "none.py")], "there is no such file"),
        (["--report", str(tmp_path), "-m", "llava.eval.run_llava"], "is a folder: name a file"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(["--mode", "origin", *words])


@pytest.fixture
def loader(tower_folder, monkeypatch):
    """A tiny model where LLaVA's loader would read one, and the device it was asked for where a length would be."""
    from llava.model import builder

    signature = inspect.signature(builder.load_pretrained_model)

    def load_pretrained_model(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        return None, tiny_llava(tower_folder), None, call.arguments["device"]

    load_pretrained_model.__signature__ = signature
    monkeypatch.setattr(builder, "load_pretrained_model", load_pretrained_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", [("auto", "cuda"), ("auto",), ()], ids=["device", "device_map", "neither"])
def test_programs_may_name_the_device_by_position(loader, device):
    from llava.model import builder

    with pruned_loading(lambda model: None, None):
        assert builder.load_pretrained_model("path", None, "llava", False, False, *device)[-1] == "cpu"


WANDERING = """
import os
from llava.model import builder
from tiny import batch_of

os.mkdir("elsewhere")
os.chdir("elsewhere")
for lengths in ([9, 12], [9]):
    model = builder.load_pretrained_model("path", None, "llava", device="cuda")[1]
    inputs = batch_of(lengths, [1] * len(lengths))
    model.generate(inputs["input_ids"], images=inputs["images"], max_new_tokens=1)
"""


def test_a_report_is_where_it_was_asked_for_with_the_lines_of_every_model(loader, tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(WANDERING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "r.jsonl").write_text("of an earlier run\n")
    run(["--mode", "origin", "--report", "r.jsonl", "-m", "program.py"])
    assert [line["vision_tokens"] for line in read_sidecar(tmp_path / "r.jsonl")] == [16, 16, 16]


def test_soft_mode_is_none_that_a_program_runs_in(capsys):
    with pytest.raises(SystemExit):
        run(["--mode", "soft", "-m", "llava.eval.run_llava"])
    assert "invalid choice: 'soft'" in capsys.readouterr().err


def test_cuda_and_half_become_cpu_and_float_only_within_the_block():
    x = torch.ones(2)
    with CudaToCpu():
        assert x.to("cuda").device.type == "cpu" and x.cuda().device.type == "cpu"
        assert x.to(dtype=torch.float16, device="cuda").dtype == torch.float32 and x.half().dtype == torch.float32
        assert x.to(torch.int64).dtype == torch.int64
    assert x.half().dtype == torch.float16


def test_scripts_are_valid_shell():
    for script in (*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", str(script)], check=True)
