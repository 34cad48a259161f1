"""Training on a GPU: bf16 under ZeRO-2 and ZeRO-3, quantised bases, and evaluation in fp16."""

import importlib.util
import json
import subprocess
import sys

import pytest
from launch import environment, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("stage", "checkpointing"), [("2", False), ("3", True)])
def test_bf16_training(testbed, tmp_path, stage, checkpointing):
    logs = train(testbed, tmp_path, 1, stage, 4, bf16=True, gradient_checkpointing=checkpointing)
    assert all(entry["loss"] == entry["loss"] for entry in logs)
    print(f"zero{stage}", [entry["loss/task"] for entry in logs])


@pytest.mark.parametrize(("bits", "lora"), [(4, False), (4, True), (8, False)])
def test_quantised_base(testbed, tmp_path, bits, lora):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    flags = {"lora_enable": True, "lora_r": 4} if lora else {}
    logs = train(testbed, tmp_path, 1, 2, 4, bf16=True, bits=bits, gradient_checkpointing=True, **flags)
    assert (tmp_path / "pruners.safetensors").is_file()
    print(f"bits {bits} lora {lora}", [entry["loss/task"] for entry in logs])


def test_trained_pruners_answer_in_fp16(testbed, tmp_path):
    train(testbed, tmp_path, 1, None, 4, prune_pruner_lr=1e-3)
    report, answers = tmp_path / "report.jsonl", tmp_path / "answers.jsonl"
    arguments = ["run", "--pruners", tmp_path, "--mode", "hard", "--report", report, "-m"]
    arguments += ["llava.eval.model_vqa_loader", "--model-path", testbed / "llava-mosaic-tiny", "--conv-mode", "v1"]
    arguments += ["--image-folder", testbed, "--question-file", testbed / "test.jsonl", "--answers-file", answers]
    command = [sys.executable, "-m", "llava_prune", *map(str, arguments), "--temperature", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(answers.read_text().splitlines()) == len(report.read_text().splitlines()) == 24
    assert json.loads(report.read_text().splitlines()[0])["vision_tokens"] == 144
