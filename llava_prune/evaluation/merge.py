"""Chunks of one run as one answers file, once every question has its answer.

    python -m llava_prune.evaluation.merge --question-file Q --answers-file OUT CHUNK...

OUT is the chunks one after the other, byte for byte. `OUT` with `.report.jsonl` for `.jsonl` is their sidecars, a line
an answer, each with its `question_id`. Nothing is written unless the answers are complete and in order.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..checkpoint import write_atomically
from ..sidecar import read_sidecar
from .questions import check_answers, read_lines, read_questions


def report_path(answers: str | Path) -> Path:
    """Where the sidecar of an answers file lies: `pope.jsonl` has `pope.report.jsonl`."""
    return Path(answers).with_suffix(".report.jsonl")


def merge(question_file: str | Path, chunks: list[Path], answers_file: str | Path) -> int:
    """Write answers and sidecar; returns the number of answers.

    Raises:
        FileNotFoundError: a chunk or its sidecar is not there.
        ValueError: answers are missing, torn or out of order, or a sidecar is not of its answers.
    """
    answers, reports = [], []
    for chunk in chunks:
        lines, report = read_lines(chunk, ("question_id", "prompt", "text")), read_sidecar(report_path(chunk))
        if len(lines) != len(report):
            raise ValueError(f"{chunk} holds {len(lines)} answers, its sidecar {len(report)} lines: answer again")
        answers += lines
        reports += report
    check_answers(answers, read_questions(question_file), " + ".join(map(str, chunks)))
    described = [{"question_id": a["question_id"], **line} for a, line in zip(answers, reports, strict=True)]
    text = "".join(json.dumps(line) + "\n" for line in described)
    target = Path(answers_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(report_path(target), lambda path: path.write_text(text))
    write_atomically(target, lambda path: path.write_bytes(b"".join(chunk.read_bytes() for chunk in chunks)))
    return len(answers)


def main() -> None:
    """The command line; exits with a message when the chunks are not complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question-file", required=True, type=Path)
    parser.add_argument("--answers-file", required=True, type=Path, help="file to write")
    parser.add_argument("chunks", nargs="+", type=Path, help="answers of each chunk, in their order")
    args = parser.parse_args()
    try:
        number = merge(args.question_file, args.chunks, args.answers_file)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"llava_prune.evaluation.merge: {error}")
    print(f"{args.answers_file}: {number} answers")


if __name__ == "__main__":
    main()
