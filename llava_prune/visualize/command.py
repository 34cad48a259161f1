"""`python -m llava_prune visualize`: what each pruning layer keeps of a picture, question by question.

    python -m llava_prune visualize --model DIR --pruners DIR --image FILE --question "..." --html kept.html

With `--report FILE` it draws what `run --report` recorded instead (`visualize --report FILE --help`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import load_pruners, read_description, read_weights, write_atomically
from ..patch import prune_mode, require_handle
from ..report import Report, last_report
from ..reporting.samples import IMAGE_MARK
from ..reporting.samples import Sample as Asked
from ..stacks import STACKS
from . import recorded
from .chat import Chat, load_chat
from .page import write_page
from .png import draw_kept_tokens, require_matplotlib
from .sample import Sample, read_picture


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_prune visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="the base model: a checkpoint's folder, or a hub name")
    parser.add_argument("--model_base", help="llava stack: the model under a LoRA checkpoint given as --model")
    parser.add_argument("--pruners", required=True, help="output directory of a pruner training")
    parser.add_argument("--image", required=True, type=Path, help="picture file")
    parser.add_argument("--question", required=True, action="append", help="about the picture; repeatable")
    parser.add_argument("--stack", choices=STACKS, help="code base of --model; default: as the checkpoint's format")
    parser.add_argument("--mode", choices=("hard", "masked"), default="hard", help="drawn and answered beside origin")
    parser.add_argument("--average_tokens", type=float, help="keep exactly this many, averaged over decoder layers")
    parser.add_argument("--allow_other_base", action="store_true", help="accept a base model under another name")
    parser.add_argument("--conv_mode", default="v1", help="llava stack: conversation format of the prompt")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--out", type=Path, default=Path("kept_tokens.png"), help="picture to write")
    parser.add_argument("--html", type=Path, help="page to write, one self-contained file")
    parser.add_argument("--json", type=Path, help="kept indices and keep probabilities to write")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; exits with a message when something given can not be used."""
    words = {word.split("=")[0] for word in argv}
    try:
        if "--report" in words:
            recorded.main(argv)
        else:
            visualize(build_parser().parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"llava_prune visualize: {error}")


def visualize(args: argparse.Namespace) -> None:
    """Ask all questions, and write what was asked for.

    Raises:
        ValueError, OSError, ImportError: something given can not be used, or is not installed.
    """
    _check(args)
    picture = read_picture(args.image)
    chat = load_chat(args.model, args.stack, args.model_base, args.conv_mode)
    load_pruners(chat.model, args.pruners, args.mode, args.allow_other_base, args.average_tokens)
    samples = [ask(chat, picture, args.image, question, args.mode, args.max_new_tokens) for question in args.question]
    document = describe(samples, picture.size, args)
    draw_kept_tokens(samples, args.out)
    if args.html:
        write_page(document, picture, args.html)
    if args.json:
        write_atomically(args.json, lambda path: path.write_text(json.dumps(document, ensure_ascii=False) + "\n"))
    for sample in samples:
        counts = ", ".join(f"layer {layer}: {len(kept)}" for layer, kept in sample.kept.items())
        print(f"{sample.question}\n  kept of {sample.vision_tokens} vision tokens: {counts}")
        for mode, text in sample.answers.items():
            print(f"  {mode}: {text}")
    print("wrote " + ", ".join(str(path) for path in (args.out, args.html, args.json) if path))


def _check(args: argparse.Namespace) -> None:
    """Everything that can be checked before a model is loaded."""
    for question in args.question:
        if not question.strip():
            raise ValueError("a --question is empty: ask something about the picture")
        if IMAGE_MARK in question:
            raise ValueError(f"leave {IMAGE_MARK} out of --question: the one picture is put before it")
    for path in (args.out, args.html, args.json):
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"no folder {path.parent} to write {path.name} to")
    require_matplotlib()
    read_description(args.pruners)
    read_weights(args.pruners)


def ask(chat: Chat, picture: Any, path: Path, question: str, mode: str, max_new_tokens: int) -> Sample:
    """Both answers to a question, and what `mode` kept.

    Args:
        chat: a model with pruners attached.
        picture: PIL picture, read from `path`.
        mode: `hard` or `masked`.

    Raises:
        ValueError: where the tokens lie in the picture is not known, or the model computes NaN.
    """
    if require_handle(chat.model).pruners.merger is not None:
        raise ValueError("these pruners have a token merger, and merged tokens have no place in the picture")
    answers = {}
    for name in ("origin", mode):
        with prune_mode(chat.model, name):
            (answers[name],) = chat.answers([Asked(picture, question)], max_new_tokens)
    report = last_report(chat.model)
    _check_numbers(report)
    vision_tokens = int(report.vision_tokens[0])
    return Sample(
        picture=path,
        question=question,
        answers=answers,
        vision_tokens=vision_tokens,
        grids=chat.grids(picture.size, vision_tokens),
        average_tokens=float(report.average_tokens[0]),
        kept={layer: rows[0].tolist() for layer, rows in report.kept.items()},
        probabilities={layer: rows[0].tolist() for layer, rows in report.probabilities.items()},
    )


def _check_numbers(report: Report) -> None:
    """NaN stands for a token that was dropped before, so a model that computes NaN must not be drawn."""
    left = int(report.vision_tokens[0])
    for layer, kept in report.kept.items():
        decided = int(report.probabilities[layer][0].isfinite().sum())
        if decided != left:
            raise ValueError(
                f"layer {layer} has {decided} keep probabilities for {left} tokens: the model computes NaN. "
                "Check that all its weights were loaded, and the dtype"
            )
        left = len(kept[0])


def describe(samples: list[Sample], size: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """What `--json` writes: the run, the grids that all questions share, and `Sample.to_dict` of each question."""
    return {
        "model": args.model,
        "pruners": args.pruners,
        "mode": args.mode,
        "budget": args.average_tokens,
        "picture": {"file": str(args.image), "width": size[0], "height": size[1]},
        "vision_tokens": samples[0].vision_tokens,
        "grids": [grid.to_dict() for grid in samples[0].grids],
        "questions": [sample.to_dict() for sample in samples],
    }
