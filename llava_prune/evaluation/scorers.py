"""LLaVA's and the benchmarks' own scorers, run on answers that were held against every question first.

None of them notices a short or misaligned file: POPE's pairs answers and labels by order, TextVQA's scores what is
there, ScienceQA's counts what is missing as wrong. Each function here checks, runs the scorer in a process of its own
with its output passed on, and reads the figures from that output.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .convert import convert_gqa, convert_mme, convert_seed, seed_accuracy
from .questions import read_answers, read_lines

FIGURE = r"(-?\d+(?:\.\d+)?)"


class Score(NamedTuple):
    """A benchmark's headline.

    Attributes:
        metric: what the figure is.
        value: in percent (MME: points), None where only a server or a judge can tell.
        submission: the file for that server or judge, None where there is none.
        details: further figures.
    """

    metric: str
    value: float | None
    submission: Path | None = None
    details: dict[str, Any] = {}


def _run(*command: Any, cwd: Path | None = None) -> str:
    """Output of `python COMMAND`, which is also printed; raises ValueError with its last lines if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ValueError(f"{command[0]} failed:\n{done.stderr[-1000:]}")
    return done.stdout


def _llava_file(name: str) -> Path:
    """A file of `llava.eval`, found and run without importing LLaVA."""
    return Path(importlib.util.find_spec("llava").submodule_search_locations[0]) / "eval" / f"{name}.py"


def _figures(pattern: str, output: str, program: str) -> list[float]:
    found = [float(value) for value in re.findall(pattern, output)]
    if not found:
        raise ValueError(f"{program} printed no figure of the form {pattern}:\n{output[-500:]}")
    return found


def pope(annotation_dir: Path, question_file: Path, result_file: Path) -> Score:
    """Mean F1 of POPE's categories; the labels must be those of the questions, line by line."""
    answers = read_answers(result_file, question_file)
    asked: dict[str, list[dict]] = {}
    for question in read_lines(question_file, ("category", "image", "text")):
        asked.setdefault(question["category"], []).append(question)
    files = {file.name.removeprefix("coco_pope_").removesuffix(".json"): file for file in annotation_dir.iterdir()}
    if files.keys() != asked.keys():
        raise ValueError(
            f"{annotation_dir} must hold coco_pope_CATEGORY.json for {sorted(asked)} and nothing else, it has "
            f"{sorted(file.name for file in files.values())}"
        )
    for category, questions in asked.items():
        labels = read_lines(files[category], ("image", "text", "label"))
        same = [
            label["image"] == question["image"] and question["text"].startswith(label["text"].strip())
            for label, question in zip(labels, questions, strict=False)
        ]
        if len(labels) != len(questions) or not all(same):
            raise ValueError(
                f"{files[category]} has {len(labels)} labels, the {len(questions)} questions of {question_file} are "
                "others: take the files of POPE's commit e3e39262c85a6a83f26cf5094022a782cb0df58d"
            )
    output = _run(
        _llava_file("eval_pope"),
        *("--annotation-dir", annotation_dir, "--question-file", question_file, "--result-file", result_file),
    )
    categories = re.findall(r"Category: (\S+), # samples: (\d+)", output)
    f1 = _figures(rf"F1 score: {FIGURE}", output, "eval_pope")
    accuracy = _figures(rf"Accuracy: {FIGURE}", output, "eval_pope")
    if len(f1) != len(asked) or sum(int(samples) for _, samples in categories) != len(answers):
        raise ValueError(f"eval_pope scored other answers than the {len(answers)} in {result_file}")
    details = {f"f1 {name}": 100 * value for (name, _), value in zip(categories, f1, strict=True)}
    return Score("mean F1", 100 * sum(f1) / len(f1), details=details | {"accuracy": 100 * sum(accuracy) / len(f1)})


def textvqa(annotation_file: Path, question_file: Path, result_file: Path) -> Score:
    """Soft accuracy over all questions."""
    answers = read_answers(result_file, question_file)
    output = _run(
        *("-m", "llava.eval.eval_textvqa", "--annotation-file", annotation_file, "--result-file", result_file)
    )
    if _figures(r"Samples: (\d+)", output, "eval_textvqa") != [len(answers)]:
        raise ValueError(f"eval_textvqa scored other answers than the {len(answers)} in {result_file}")
    return Score("accuracy", _figures(rf"Accuracy: {FIGURE}%", output, "eval_textvqa")[0])


def sqa(base_dir: Path, question_file: Path, result_file: Path) -> Score:
    """Accuracy over questions with an image, as LLaVA reports it; over all questions beside it."""
    answers = read_answers(result_file, question_file)
    wanted = set(json.loads((base_dir / "pid_splits.json").read_text())["test"])
    if missing := sorted(wanted - {answer["question_id"] for answer in answers}):
        raise ValueError(f"{question_file} does not ask {len(missing)} questions of the test split, as {missing[:3]}")
    stem = result_file.with_suffix("")
    output = _run(
        _llava_file("eval_science_qa"),
        *("--base-dir", base_dir, "--result-file", result_file),
        *("--output-file", f"{stem}_output.jsonl", "--output-result", f"{stem}_result.json"),
    )
    if _figures(r"Total: (\d+)", output, "eval_science_qa") != [len(wanted)]:
        raise ValueError(f"eval_science_qa scored other questions than the {len(wanted)} of the test split")
    image = _figures(rf"IMG-Accuracy: {FIGURE}%", output, "eval_science_qa")[0]
    return Score(
        "image accuracy",
        image,
        details={"accuracy": _figures(rf", Accuracy: {FIGURE}%", output, "eval_science_qa")[0]},
    )


def gqa(data_dir: Path, question_file: Path, result_file: Path) -> Score:
    """Accuracy by GQA's `eval/eval.py` if it is there, else the predictions for it, which lie beside the answers."""
    read_answers(result_file, question_file)
    predictions = convert_gqa(result_file, result_file.with_suffix(".predictions.json"))
    if not (data_dir / "eval" / "eval.py").is_file() or not (data_dir / "testdev_balanced_questions.json").is_file():
        print(f"{data_dir} lacks eval/eval.py or testdev_balanced_questions.json of GQA: put them there to score")
        return Score("accuracy", None, predictions)
    # this run's own: the file that eval.py reads by default is one for all runs
    own = str(predictions.resolve()).replace("{", "{{").replace("}", "}}")  # eval.py puts the tier into {tier}
    output = _run(Path("eval/eval.py"), "--tier", "testdev_balanced", "--predictions", own, cwd=data_dir)
    return Score("accuracy", _figures(rf"(?m)^Accuracy: {FIGURE}", output, "eval.py")[0], predictions)


def mme(data_dir: Path, question_file: Path, result_file: Path) -> Score:
    """Perception plus cognition points by MME's `calculation.py` if it is there, else the files for it."""
    read_answers(result_file, question_file)
    folder = convert_mme(data_dir, result_file.stem)
    tool = data_dir / "eval_tool"
    if not (tool / "calculation.py").is_file():
        print(f"no {tool / 'calculation.py'}: put MME's eval_tool there to score {folder}")
        return Score("perception + cognition", None, folder)
    output = _run(Path("calculation.py"), "--results_dir", f"answers/{result_file.stem}", cwd=tool)
    totals = _figures(rf"total score: {FIGURE}", output, "calculation.py")
    if len(totals) != 2:
        raise ValueError(f"calculation.py printed {len(totals)} total scores, expected perception and cognition")
    return Score(
        "perception + cognition", sum(totals), details=dict(zip(("perception", "cognition"), totals, strict=True))
    )


def seed(annotation_file: Path, question_file: Path, result_file: Path, result_upload_file: Path) -> Score:
    """Accuracy over all questions; by type, and of images and videos, beside it."""
    read_answers(result_file, question_file)
    convert_seed(annotation_file, result_file, result_upload_file)
    details = seed_accuracy(annotation_file, result_file)
    return Score("accuracy", details.pop("total"), result_upload_file, details)


def mosaic(annotation_file: Path, question_file: Path, result_file: Path) -> Score:
    """Accuracy on the testbed."""
    from ..testbed.score import score

    read_answers(result_file, question_file)
    result = score(result_file, annotation_file)
    return Score("accuracy", 100 * result["accuracy"], details={k: 100 * v for k, v in result["kinds"].items()})


def submission(metric: str, question_file: Path, result_file: Path, file: Path) -> Score:
    """No score here: `file` is for a server or a judge."""
    read_answers(result_file, question_file)
    if not file.exists():
        raise FileNotFoundError(f"no {file}: the converter has not run")
    return Score(metric, None, file)
