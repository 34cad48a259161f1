"""`visualize --report`: questions that `llava_prune run --report` answered, drawn without loading a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..sidecar import read_sidecar
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
        ValueError: nothing was kept, since the run was not in hard mode, or a sample has no square grid.
    """
    questions = [json.loads(line) for line in args.question_file.read_text().splitlines()]
    answers = {f.stem: [json.loads(line)["text"] for line in f.read_text().splitlines()] for f in args.answers_file}
    lines = [(i, line) for i, line in enumerate(read_sidecar(args.report)) if line["vision_tokens"]]
    if any(line["mode"] == "origin" for _, line in lines):
        raise ValueError(f"{args.report} is of mode origin, which drops nothing: give that of a run in mode hard")
    return [
        recorded_sample(
            line,
            args.image_folder / questions[i]["image"],
            questions[i]["text"],
            {name: texts[i] for name, texts in answers.items()},
        )
        for i, line in lines[: args.number]
    ]
