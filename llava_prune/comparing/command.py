"""`python -m llava_prune compare`: methods at several budgets on the same questions, with tests, a table and a plot.

    python -m llava_prune compare --pruners ours=outputs/prune --out outputs/compare
    python -m llava_prune compare --model llava-v1.5-7b --pruners DIR --methods fastv,divprune --budgets 192,128,64 \\
        --question-file Q.jsonl --image-folder IMAGES --answers A.jsonl --out OUT

Without --model it is the testbed's model, without --question-file the testbed's test questions, both in OUT/testbed.
Every pruners directory is also run as it was trained, at its own budget by threshold. The same command started again
goes on after the last finished cell.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import compat
from ..baselines import METHODS
from ..checkpoint import read_description, read_weights, write_atomically
from ..stacks import STACKS
from ..visualize.png import require_matplotlib
from .cells import PRUNERS, Cell, CellFiles, parse_pruners, plan
from .plot import draw_compare
from .questions import read_questions
from .summary import Row, summarise
from .table import print_table, write_csv

TESTBED_BUDGETS = "72,41,29"


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_prune compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--model", help="the base model: a checkpoint's folder, or a hub name; default: the testbed's")
    what.add_argument("--model_base", help="llava stack: the model under a LoRA checkpoint given as --model")
    what.add_argument("--stack", choices=STACKS, help="code base of --model; default: as the checkpoint's format")
    what.add_argument(
        "--pruners",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="output directory of a training; repeatable",
    )
    what.add_argument("--allow_other_base", action="store_true", help="accept a base model under another name")
    what.add_argument(
        "--methods", default="all", help=f"baselines, separated by commas, or all or none: {', '.join(METHODS)}"
    )
    what.add_argument(
        "--budgets", help=f"average tokens, separated by commas; needed with --model, else {TESTBED_BUDGETS}"
    )
    what.add_argument("--seed", type=int, default=0, help="of the baseline random")
    asked = parser.add_argument_group("questions")
    asked.add_argument("--question-file", type=Path, help="LLaVA's JSON lines with question_id, image and text")
    asked.add_argument("--image-folder", type=Path, help="what its pictures are relative to")
    asked.add_argument(
        "--answers", type=Path, help="JSON lines with question_id and answer, held against word by word"
    )
    asked.add_argument("--number", type=int, help="only the first so many questions")
    asked.add_argument("--conv-mode", default="v1", help="llava stack: LLaVA's conversation template")
    asked.add_argument("--max_new_tokens", type=int, default=128, help="longest answer")
    asked.add_argument("--batch_size", type=int, default=1, help="questions answered at once; 1 is what LLaVA does")
    timing = parser.add_argument_group("timing, at batch 1")
    timing.add_argument("--timed", type=int, default=4, help="questions that are timed, the first ones; 0: none")
    timing.add_argument("--warmup", type=int, default=2, help="calls of each that are thrown away")
    timing.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/compare"), help="folder of compare.csv, .json and .png"
    )
    parser.add_argument(
        "--cells", type=Path, help="folder of finished cells, which comparisons may share; default: OUT/cells"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command; exits with a message when something given can not be used."""
    args = build_parser().parse_args(argv)
    try:
        compare(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"llava_prune compare: {error}")
    except KeyboardInterrupt:
        sys.exit("\nllava_prune compare: stopped; the same command goes on after the last finished cell")


def compare(args: argparse.Namespace) -> None:
    """Run what is not there yet, and write table, CSV, JSON and plot.

    Raises:
        ValueError, OSError, ImportError: something given can not be used, or is not installed.
    """
    baselines, budgets = read_methods(args.methods), read_budgets(args)
    pruners = parse_pruners(args.pruners)
    for directory in pruners.values():
        read_description(directory)
        read_weights(directory)
    _check(args)
    require_matplotlib()
    model, *asked = _data(args)
    questions = read_questions(*asked, args.number)
    cells = plan(baselines, pruners, budgets, args.seed, args.allow_other_base)

    from ..visualize.chat import load_chat
    from .runner import Settings, inputs_of, run_cells

    chat = load_chat(str(model), args.stack, args.model_base, args.conv_mode)
    _check_fit(chat.model, cells)
    settings = Settings(args.batch_size, args.max_new_tokens, args.timed, args.warmup, args.repeats)
    inputs = inputs_of(chat, questions, settings)
    files = CellFiles(args.cells or args.out / "cells", inputs)
    results = run_cells(chat, cells, files, questions, settings)
    _write(args.out, summarise(cells, results, questions), len(questions), inputs, Path(model).name)


def read_methods(text: str) -> list[str]:
    """Names of baselines; raises ValueError for one that does not exist."""
    if text in ("all", "none"):
        return list(METHODS) if text == "all" else []
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--methods: no baseline {name!r}; use all, none, or some of {', '.join(METHODS)}")
    return names


def read_budgets(args: argparse.Namespace) -> list[float]:
    """Average tokens, the largest first; raises ValueError for what is not a positive number."""
    if args.budgets is None and args.model is not None:
        if args.methods != "none":
            raise ValueError(
                "--budgets is needed with --model, as 192,128,64; only trained pruners have one of their own"
            )
        return []
    try:
        budgets = [float(part) for part in (args.budgets or TESTBED_BUDGETS).split(",")]
    except ValueError as error:
        raise ValueError(f"--budgets {args.budgets}: expected numbers separated by commas, as 192,128,64") from error
    if not all(0 < budget < float("inf") for budget in budgets):
        raise ValueError(f"--budgets {args.budgets}: average tokens must be positive")
    return sorted(set(budgets), reverse=True)


def _check(args: argparse.Namespace) -> None:
    if args.methods == "none" and not args.pruners:
        raise ValueError("nothing to compare with origin: give --methods or --pruners")
    files = (args.question_file, args.image_folder, args.answers)
    if any(files) and not all(files):
        raise ValueError("--question-file, --image-folder and --answers belong together")
    least = {"batch_size": 1, "number": 1, "max_new_tokens": 1, "timed": 0, "warmup": 0, "repeats": 1}
    for name, bound in least.items():
        if getattr(args, name) is not None and getattr(args, name) < bound:
            raise ValueError(f"--{name} must be at least {bound}, got {getattr(args, name)}")


def _data(args: argparse.Namespace) -> tuple[str | Path, Path, Path, Path]:
    """Model, question file, image folder and answers; the testbed's in OUT, made if need be, where none are given."""
    model, files = args.model, (args.question_file, args.image_folder, args.answers)
    if model is None or not all(files):
        from ..testbed.install import install_base
        from ..testbed.prepare import prepare

        folder = args.out.resolve() / "testbed"
        if not (folder / "mosaic.json").is_file():
            prepare(folder, train=1)  # the test questions do not depend on it
        model = model or install_base(folder)
        files = files if all(files) else (folder / "test.jsonl", folder, folder / "test_answers.jsonl")
    return (model, *files)


def _check_fit(model: Any, cells: list[Cell]) -> None:
    """Raises ValueError for pruners that are not of this model and for budgets that prune nothing."""
    tokens = compat.vision_tokens_per_image(model)
    for cell in cells:
        if cell.method.kind == PRUNERS and cell.budget is None:
            cell.method.attach(model, None).remove()
        if tokens is not None and cell.budget is not None and cell.budget >= tokens:
            raise ValueError(f"--budgets: {cell.budget:g} prunes nothing, an image has {tokens} vision tokens here")


def _write(out: Path, rows: list[Row], number: int, inputs: dict[str, Any], model: str) -> None:
    document = {
        "model": model,
        "questions": number,
        "vision_tokens": rows[0].average_tokens,
        "inputs": inputs,
        "rows": [asdict(row) for row in rows],
    }
    write_csv(rows, out / "compare.csv")
    write_atomically(out / "compare.json", lambda path: path.write_text(json.dumps(document, indent=2) + "\n"))
    draw_compare(rows, f"{model}, {number} questions", out / "compare.png")
    print_table(rows, number, model)
    print("wrote " + ", ".join(str(out / f"compare.{kind}") for kind in ("csv", "json", "png")))
