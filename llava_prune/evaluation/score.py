"""`python -m llava_prune.evaluation.score BENCHMARK`: a benchmark's figure and what it cost, in one JSON file.

    python -m llava_prune.evaluation.score pope --annotation-dir D --question-file Q --result-file A --out pope.json

The answers `A` are checked against the questions `Q` before anything is scored; `table` reads what is written here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..sidecar import read_sidecar
from . import scorers
from .merge import report_path
from .questions import read_lines

# the arguments that a scorer takes beside the question file and the answers
SCORERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "gqa": (scorers.gqa, ("data-dir",)),
    "mme": (scorers.mme, ("data-dir",)),
    "mosaic": (scorers.mosaic, ("annotation-file",)),
    "pope": (scorers.pope, ("annotation-dir",)),
    "seed": (scorers.seed, ("annotation-file", "result-upload-file")),
    "sqa": (scorers.sqa, ("base-dir",)),
    "textvqa": (scorers.textvqa, ("annotation-file",)),
    "submission": (scorers.submission, ("metric", "file")),
}


def measured(result_file: Path) -> dict[str, Any]:
    """Means over the questions with an image, and the median wall time of one question.

    Raises:
        ValueError: the sidecar is not of these answers.
    """
    answers, report = read_lines(result_file, ("question_id",)), read_sidecar(report_path(result_file))
    if [line["question_id"] for line in report] != [answer["question_id"] for answer in answers]:
        raise ValueError(f"{report_path(result_file)} is not the sidecar of {result_file}: answer again")
    seen = [line for line in report if line["vision_tokens"]]
    means = {
        name: statistics.fmean(line[name] for line in seen) if seen else None
        for name in ("vision_tokens", "average_tokens", "llm_flops")
    }
    return {
        "questions": len(answers),
        "with_image": len(seen),
        **means,
        "median_seconds": statistics.median(line["seconds"] for line in report),
    }


def main() -> None:
    """The command line; exits with a message instead of a figure when something is missing or misaligned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="scorer", required=True)
    for name, (function, arguments) in SCORERS.items():
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        for argument in arguments:
            command.add_argument(f"--{argument}", type=str if argument == "metric" else Path, required=True)
        command.add_argument("--question-file", type=Path, required=True)
        command.add_argument("--result-file", type=Path, required=True, help="merged answers, their sidecar beside")
        command.add_argument("--out", type=Path, required=True, help="JSON file to write")
        for note in ("model", "mode", "method"):
            command.add_argument(f"--{note}", default="", help="kept in the JSON file")
    args = vars(parser.parse_args())
    scorer, out = args.pop("scorer"), args.pop("out")
    notes = {name: args.pop(name) for name in ("model", "mode", "method")}
    try:
        figures = measured(args["result_file"])
        result = SCORERS[scorer][0](**args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"llava_prune.evaluation.score {scorer}: {error}")
    record = {
        "benchmark": out.stem,
        **notes,
        "metric": result.metric,
        "score": result.value,
        "details": result.details,
        "submission": None if result.submission is None else str(result.submission),
        "answers": str(args["result_file"]),
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    value = f"submission file: {result.submission}" if result.value is None else f"{result.metric} {result.value:.2f}"
    tokens = "" if record["average_tokens"] is None else f", {record['average_tokens']:.1f} average tokens"
    print(f"{out.stem}: {value}{tokens}")


if __name__ == "__main__":
    main()
