"""`visualize --report`: questions that `llava_prune run --report` answered, drawn without loading a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.questions import read_lines
from .png import draw_kept_tokens
from .sample import Sample, recorded_sample


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the recorded form."""
    parser = argparse.ArgumentParser(prog="python -m llava_prune visualize --report", description=__doc__)
    parser.add_argument("--report", required=True, type=Path, help="what `run --report` wrote, in hard mode")
    parser.add_argument("--question-file", required=True, type=Path, help="LLaVA's question file (JSON lines)")
    parser.add_argument("--image-folder", required=True, type=Path)
    parser.add_argument("--answers-file", type=Path, action="append", default=[], help="answers to print; repeatable")
    parser.add_argument("--number", type=int, default=6, help="questions to draw")
    parser.add_argument("--out", type=Path, default=Path("kept_tokens.png"))
    return parser


def main(argv: list[str]) -> None:
    """Draw the first questions with an image; ValueError or OSError when a file can not be used."""
    args = build_parser().parse_args(argv)
    draw_kept_tokens(read_samples(args), args.out)
    print(f"wrote {args.out}")


def read_samples(args: argparse.Namespace) -> list[Sample]:
    """The questions to draw.

    Raises:
        ValueError: nothing was kept, since the run was not in hard mode; the files are not of the same questions; or a
            sample has no square grid.
    """
    report = read_lines(args.report, ("mode", "vision_tokens"))
    lines = [(i, line) for i, line in enumerate(report) if line["vision_tokens"]]
    if any(line["mode"] == "origin" for _, line in lines):
        raise ValueError(f"{args.report} is of mode origin, which drops nothing: give that of a run in mode hard")
    questions = read_lines(args.question_file, ("text",))
    _check_questions(report, questions, args.report, args.question_file)
    answers, stems = {}, [file.stem for file in args.answers_file]
    for file in args.answers_file:
        answered = read_lines(file, ("text",))
        _check_questions(answered, questions, file, args.question_file)
        name = file.stem if stems.count(file.stem) == 1 else str(file.with_suffix(""))  # all merged ones are `merge`
        answers[name] = [line["text"] for line in answered]
    for i, _ in lines:
        if "image" not in questions[i]:
            raise ValueError(
                f"{args.question_file}, question {i + 1}, has no image, and {args.report} has vision tokens of it: "
                "give the questions of that run"
            )
    return [
        recorded_sample(
            line,
            args.image_folder / questions[i]["image"],
            questions[i]["text"],
            {name: texts[i] for name, texts in answers.items()},
        )
        for i, line in lines[: args.number]
    ]


def _check_questions(
    lines: list[dict[str, Any]], questions: list[dict[str, Any]], path: Path, question_file: Path
) -> None:
    """Raises ValueError unless `lines` are as many as `questions`, with the same ids where both have one.

    The report of a chunk has no ids, that of merged answers has.
    """
    if len(lines) != len(questions):
        raise ValueError(
            f"{path} holds {len(lines)} lines, {question_file} {len(questions)} questions: give the merged file of a "
            "whole run, or of a chunk the questions of that chunk"
        )
    for number, (line, question) in enumerate(zip(lines, questions, strict=True), start=1):
        given, asked = line.get("question_id"), question.get("question_id")
        if None not in (given, asked) and given != asked:
            raise ValueError(
                f"{path}, line {number}, is of question {given!r}, and that of {question_file} is {asked!r}: give the "
                "questions of that run, in its order"
            )
