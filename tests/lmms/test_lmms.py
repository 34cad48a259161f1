"""The real lmms-eval, offline, on the testbed: both of our models, in origin and pruned."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmms_eval", reason="needs lmms-eval: bash scripts/setup.sh lmms")

from lmms_eval.models import MODEL_REGISTRY_V2
from PIL import Image

from llava_prune import PruneConfig, attach_pruners, save_pruners
from llava_prune.convert import convert
from llava_prune.integrations.lmms_llava_hf import LlavaPruneHf
from llava_prune.integrations.lmms_task import TASK, doc_to_visual, process_results, write_task

ROOT = Path(__file__).parent.parent.parent
LLAVA_PYTHON = ROOT / ".venv" / "bin" / "python"
QUESTIONS = 8
SETTINGS = PruneConfig(pruning_layers=(1, 3, 5), target_token_num=41, pruner_dim=16, pruner_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The task, its model in both formats, and pruners with decisions of their own."""
    from tiny import randomise_pruners
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("lmms")
    write_task(out / "data", QUESTIONS)
    convert(out / "data/llava-mosaic-tiny", out / "llava-mosaic-tiny-hf")
    model = AutoModelForImageTextToText.from_pretrained(out / "llava-mosaic-tiny-hf", dtype="float32")
    randomise_pruners(attach_pruners(model, SETTINGS))
    save_pruners(model, out / "pruners")
    return out


def environment(folder):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}


def lmms_eval(folder, name, model, arguments, command=None):
    """Run the command to its end; the task's results, and the answers by question."""
    out = folder / name
    command = command or [str(Path(sys.executable).parent / "lmms-eval")]
    command += ["--model", model, "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += [
        "--tasks",
        TASK,
        "--include_path",
        str(folder / "data/tasks"),
        "--log_samples",
        "--output_path",
        str(out),
    ]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=900, cwd=folder)
    # the command itself ends with status 0 whatever happened
    results = list(out.rglob("*_results.json"))
    assert done.returncode == 0 and len(results) == 1, (done.stdout + done.stderr)[-4000:]
    (samples,) = out.rglob(f"*_samples_{TASK}.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
    accuracy = json.loads(results[0].read_text())["results"][TASK]["accuracy,none"]
    return accuracy, answers, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(folder):
    """`origin` and `hard`, each run by the command."""
    model = {"pretrained": folder / "llava-mosaic-tiny-hf"}
    pruned = {"pruners": folder / "pruners", "mode": "hard", "average_tokens": 40, "report": folder / "hard.jsonl"}
    small = [str(Path(sys.executable).parent / "lmms-eval"), "--batch_size", "3"]
    return {
        "origin": lmms_eval(folder, "origin", "llava_prune_hf", model | {"mode": "origin"}),
        "hard": lmms_eval(folder, "hard", "llava_prune_hf", model | pruned, small),
    }


def documents(folder):
    return [json.loads(line) for line in (folder / f"data/tasks/{TASK}.jsonl").read_text().splitlines()]


def test_the_command_scores_both_modes(runs, folder):
    origin, answers, log = runs["origin"]
    marks = [process_results(doc, [answers[i]])["accuracy"] for i, doc in enumerate(documents(folder))]
    assert origin == sum(marks) / QUESTIONS >= 7 / 8
    assert f"mode origin, 144.0 average tokens of 144.0 over {QUESTIONS} samples" in log
    hard, answers, log = runs["hard"]
    assert len(answers) == QUESTIONS and 0 <= hard <= 1
    report = [json.loads(line) for line in (folder / "hard.jsonl").read_text().splitlines()]
    assert len(report) == QUESTIONS
    assert all(39 < line["average_tokens"] <= 40 for line in report)
    assert f"mode hard, {report[0]['average_tokens']:.1f} average tokens of 144.0" in log


def test_batches_answer_as_the_model_alone_does(runs, folder):
    """Hard mode in padded batches of three is the same as one prompt after the other through plain transformers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llava_prune import load_pruners

    model = AutoModelForImageTextToText.from_pretrained(folder / "llava-mosaic-tiny-hf", dtype="float32")
    processor = AutoProcessor.from_pretrained(folder / "llava-mosaic-tiny-hf")
    load_pruners(model, folder / "pruners", average_tokens=40)
    _, answers, _ = runs["hard"]
    for number, document in enumerate(documents(folder)):
        content = [{"type": "image"}, {"type": "text", "text": document["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=doc_to_visual(document), return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert answers[number] == text.strip(), document


@pytest.mark.skipif(not LLAVA_PYTHON.is_file(), reason="needs LLaVA's stack beside: bash scripts/setup.sh llava")
def test_llava_prune_runs_in_llavas_own_stack_and_answers_alike(runs, folder):
    """lmms-eval and what it imports come from this environment, LLaVA and transformers 4.37.2 from the other."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    program = f"import sys; sys.path.append({site!r}); from lmms_eval.cli.dispatch import main; sys.exit(main())"
    command = [str(LLAVA_PYTHON), "-c", program, "--device", "cpu"]
    model = {"pretrained": folder / "data/llava-mosaic-tiny", "device_map": "auto"}
    pruned = {"pruners": folder / "pruners", "average_tokens": 40}
    _, answers, log = lmms_eval(folder, "llava-origin", "llava_prune", model | {"mode": "origin"}, list(command))
    assert answers == runs["origin"][1] and f"144.0 average tokens of 144.0 over {QUESTIONS} samples" in log
    _, answers, log = lmms_eval(folder, "llava-hard", "llava_prune", model | pruned, list(command))
    same = sum(answers[number] == text for number, text in runs["hard"][1].items())
    assert same >= QUESTIONS - 1, "fp16 there, fp32 here"
    assert "mode hard, 39.9 average tokens" in log or "mode hard, 40.0 average tokens" in log


# ---- the pieces, in this process


def test_both_models_are_found_by_the_entry_point_and_imported_when_asked_for():
    assert {"llava_prune", "llava_prune_hf"} <= set(MODEL_REGISTRY_V2.list_model_names())
    assert MODEL_REGISTRY_V2.get_model_class("llava_prune_hf") is LlavaPruneHf
    program = "import sys, lmms_eval.models as m; assert 'llava_prune' in m.AVAILABLE_MODELS; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "llava_prune.integrations.lmms_eval" in loaded and "llava_prune.integrations.lmms_llava_hf" not in loaded


@pytest.fixture(scope="module")
def harness(folder):
    """`llava_prune_hf` in this process, at 40 average tokens."""
    harness = LlavaPruneHf(
        str(folder / "llava-mosaic-tiny-hf"), batch_size=4, pruners=str(folder / "pruners"), average_tokens=40
    )
    harness.task_dict = {"t": {"test": documents(folder)}}
    return harness


def request(number, question, visuals, **settings):
    return SimpleNamespace(args=(question, {"max_new_tokens": 8, **settings}, visuals, number, "t", "test"))


def test_answers_come_back_in_order_whatever_the_batches_hold(harness, folder):
    """Questions of several lengths, one without a picture, two kinds of settings."""
    docs = documents(folder)
    requests = [request(i, doc["question"], doc_to_visual) for i, doc in enumerate(docs)]
    requests.insert(2, request(0, "What color is in row 1, column 1? " * 3, lambda doc: []))
    requests.insert(5, request(1, docs[1]["question"], doc_to_visual, temperature=0, num_beams=2))
    together = harness.generate_until(requests)
    alone = [harness.generate_until([one])[0] for one in requests]
    assert together == alone and len(set(together)) > 3


def test_pictures_go_where_the_question_places_them(harness):
    picture = Image.new("RGB", (8, 8))
    assert harness._prompt("What?", [picture]).count("<image>") == 1
    assert harness._prompt("Is <image> red?", [picture]).count("<image>") == 1
    assert harness._prompt("What?", []).count("<image>") == 0
    with pytest.raises(ValueError, match="no pictures"):
        harness.generate_until([request(0, "What?", lambda doc: ["video.mp4"])])


def test_arguments_are_checked(folder):
    model = str(folder / "llava-mosaic-tiny-hf")
    with pytest.raises(ValueError, match=r"unknown model_args \['pruner'\]"):
        LlavaPruneHf(model, pruner="x")
    with pytest.raises(ValueError, match="mode 'hard' needs pruners"):
        LlavaPruneHf(model)
    with pytest.raises(ValueError, match="not both"):
        LlavaPruneHf(model, pruners="x", baseline="fastv")
    with pytest.raises(ValueError, match="needs average_tokens"):
        LlavaPruneHf(model, baseline="fastv")
    with pytest.raises(FileNotFoundError, match="prune_config.json"):
        LlavaPruneHf(model, pruners=str(folder))
    with pytest.raises(ValueError, match="conv_template"):
        LlavaPruneHf(model, mode="origin", conv_template="plain")


def test_baselines_are_taken(folder):
    harness = LlavaPruneHf(str(folder / "llava-mosaic-tiny-hf"), baseline="fastv", average_tokens=60)
    harness.task_dict = {"t": {"test": documents(folder)}}
    assert harness.generate_until([request(0, documents(folder)[0]["question"], doc_to_visual)])[0]
    assert sum(harness.kept.average_tokens) == pytest.approx(60, abs=1)
