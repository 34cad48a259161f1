"""Answers in the form that each benchmark's scorer or server takes: `python -m llava_prune.evaluation.convert NAME`.

LLaVA keeps these converters in its repository's `scripts/`, outside its wheel. They take the arguments of LLaVA's and
write the same files, with two differences: a question without an answer is an error, and a file is there complete or
not at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .questions import read_lines


def _by_id(path: Path) -> dict[Any, str]:
    return {line["question_id"]: line["text"] for line in read_lines(path, ("question_id", "text"))}


def _write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _require(missing: list, what: Path, against: Path) -> None:
    if missing:
        raise ValueError(f"{what} has no answer to {len(missing)} questions of {against}, as {missing[:3]}")


def _answer_processor() -> Callable[[str], str]:
    from llava.eval.m4c_evaluator import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()


def convert_gqa(src: Path, dst: Path) -> Path:
    """`[{"questionId", "prediction"}]` for GQA's `eval.py`, in lower case without a full stop at the end."""
    lines = read_lines(src, ("question_id", "text"))
    rows = [{"questionId": line["question_id"], "prediction": line["text"].rstrip(".").lower()} for line in lines]
    return _write_text(dst, json.dumps(rows))


def convert_mmvet(src: Path, dst: Path) -> Path:
    """`{"v1_<question id>": answer}` for MM-Vet's grader."""
    return _write_text(dst, json.dumps({f"v1_{name}": text for name, text in _by_id(src).items()}, indent=2))


def convert_vqav2(dir: Path, ckpt: str, split: str) -> Path:
    """`[{"question_id", "answer"}]` over the whole test set, as the server wants it: '' outside of `split`."""
    source = dir / "answers" / split / ckpt / "merge.jsonl"
    whole = dir / "llava_vqav2_mscoco_test2015.jsonl"
    given = _by_id(source)
    wanted = [line["question_id"] for line in read_lines(whole, ("question_id",))]
    part = dir / f"{split}.jsonl"
    _require([line["question_id"] for line in read_lines(part) if line["question_id"] not in given], source, part)
    if unknown := sorted(given.keys() - set(wanted), key=str):
        raise ValueError(f"{source} answers {len(unknown)} questions that {whole} does not hold, as {unknown[:3]}")
    normalised = _answer_processor()
    rows = [{"question_id": name, "answer": normalised(given[name]) if name in given else ""} for name in wanted]
    return _write_text(dir / "answers_upload" / split / f"{ckpt}.json", json.dumps(rows))


def convert_vizwiz(annotation_file: Path, result_file: Path, result_upload_file: Path) -> Path:
    """`[{"image", "answer"}]` in the order of the questions."""
    given = _by_id(result_file)
    questions = read_lines(annotation_file, ("question_id", "image"))
    _require([q["question_id"] for q in questions if q["question_id"] not in given], result_file, annotation_file)
    normalised = _answer_processor()
    rows = [{"image": q["image"], "answer": normalised(given[q["question_id"]])} for q in questions]
    return _write_text(result_upload_file, json.dumps(rows))


def seed_accuracy(annotation_file: Path, result_file: Path) -> dict[str, float]:
    """SEED-Bench accuracies in percent: by question type, of `image` and `video` questions, and in `total`.

    Raises:
        ValueError: a question has no answer.
    """
    data, given = json.loads(annotation_file.read_text()), {str(k): text for k, text in _by_id(result_file).items()}
    questions = data["questions"]
    # ids are numbers in one file and strings in the other
    _require([q["question_id"] for q in questions if str(q["question_id"]) not in given], result_file, annotation_file)
    names = {number: name for name, number in data["question_type"].items()}
    marks: dict[str, list[bool]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: q["question_type_id"]):
        right = given[str(question["question_id"])] == question["answer"]
        for group in (names[question["question_type_id"]], question["data_type"], "total"):
            marks[group].append(right)
    return {group: 100 * sum(rights) / len(rights) for group, rights in marks.items()}


def convert_seed(annotation_file: Path, result_file: Path, result_upload_file: Path) -> Path:
    """`{"question_id", "prediction"}` lines for the leaderboard; prints the accuracies."""
    for group, accuracy in seed_accuracy(annotation_file, result_file).items():
        print(f"{group}: {accuracy:.2f}%")
    given = {str(name): text for name, text in _by_id(result_file).items()}
    rows = [
        {"question_id": q["question_id"], "prediction": given[str(q["question_id"])]}
        for q in json.loads(annotation_file.read_text())["questions"]
    ]
    return _write_text(result_upload_file, "".join(json.dumps(row) + "\n" for row in rows))


def convert_mmbench(annotation_file: Path, result_dir: Path, upload_dir: Path, experiment: str) -> Path:
    """An Excel sheet: the questions and options with a `prediction` column after D, without images."""
    import pandas

    source = result_dir / f"{experiment}.jsonl"
    given = _by_id(source)
    sheet = pandas.read_table(annotation_file)
    _require([index for index in sheet["index"] if index not in given], source, annotation_file)
    sheet = sheet.drop(columns=["hint", "category", "source", "image", "comment", "l2-category"])
    sheet.insert(6, "prediction", [given[index] for index in sheet["index"]])
    target = upload_dir / f"{experiment}.xlsx"
    target.parent.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        with path.open("wb") as file:  # by name alone pandas would refuse the temporary file's suffix
            sheet.to_excel(file, index=False, engine="openpyxl")

    write_atomically(target, write)
    return target


def _mme_truth(folder: Path) -> dict[tuple[str, str, str], str]:
    """(category, text file, question) -> Yes or No, from the benchmark's own folders, flat or split in two."""
    truth = {}
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        split = category / "questions_answers_YN"
        for file in sorted((split if split.is_dir() else category).glob("*.txt")):
            for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
                question, answer = line.split("\t")
                truth[category.name, file.name, question] = answer
    return truth


def convert_mme(dir: Path, experiment: str) -> Path:
    """A file a category, `image file, question, truth, answer` a line, for MME's `calculation.py`.

    That program takes two lines at a time as the two questions of one image, and what is there as all there is; so
    both are checked here.
    """
    source = dir / "answers" / f"{experiment}.jsonl"
    truth = _mme_truth(dir / "MME_Benchmark_release_version")
    rows: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
    for line in read_lines(source, ("question_id", "prompt", "text")):
        category, file = line["question_id"].split("/")[0], Path(line["question_id"]).with_suffix(".txt").name
        question = line["prompt"].replace("Answer the question using a single word or phrase.", "").strip()
        spellings = [question, f"{question} Please answer yes or no.", f"{question}  Please answer yes or no."]
        known = [spelling for spelling in spellings if (category, file, spelling) in truth]
        if not known:
            raise ValueError(f"{source}: {line['question_id']} asks {question!r}, which MME's {file} does not hold")
        # a tab or a new line in an answer would shift the columns
        rows[category].append((file, known[0], truth[category, file, known[0]], " ".join(line["text"].split())))
    answered = {(category, file, question) for category, lines in rows.items() for file, question, *_ in lines}
    _require(sorted(truth.keys() - answered), source, dir / "MME_Benchmark_release_version")
    target = dir / "eval_tool" / "answers" / experiment
    for category, lines in rows.items():
        pairs = list(zip(lines[::2], lines[1::2], strict=False))
        if len(lines) % 2 or any(a[0] != b[0] or a[1] == b[1] for a, b in pairs):
            raise ValueError(f"{source}: the two questions of an image do not follow each other in {category}")
        _write_text(target / f"{category}.txt", "".join("\t".join(line) + "\n" for line in lines))
    return target


EVAL = Path("./playground/data/eval")
CONVERTERS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "gqa": (convert_gqa, {"src": Path, "dst": Path}),
    "mmbench": (
        convert_mmbench,
        {"annotation-file": Path, "result-dir": Path, "upload-dir": Path, "experiment": str},
    ),
    "mme": (convert_mme, {"experiment": str, "dir": EVAL / "MME"}),
    "mmvet": (convert_mmvet, {"src": Path, "dst": Path}),
    "seed": (convert_seed, {"annotation-file": Path, "result-file": Path, "result-upload-file": Path}),
    "vizwiz": (convert_vizwiz, {"annotation-file": Path, "result-file": Path, "result-upload-file": Path}),
    "vqav2": (convert_vqav2, {"ckpt": str, "split": str, "dir": EVAL / "vqav2"}),
}


def main() -> None:
    """The command line; exits with a message when answers are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True)
    for name, (converter, arguments) in CONVERTERS.items():
        command = commands.add_parser(name, help=converter.__doc__.splitlines()[0])
        for argument, kind in arguments.items():
            if isinstance(kind, Path):
                command.add_argument(f"--{argument}", type=Path, default=kind)
            else:
                command.add_argument(f"--{argument}", type=kind, required=True)
    args = vars(parser.parse_args())
    name = args.pop("name")
    try:
        print(f"wrote {CONVERTERS[name][0](**args)}")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"llava_prune.evaluation.convert {name}: {error}")


if __name__ == "__main__":
    main()
