"""`python -m llava_prune run`: any LLaVA program, as it is, with pruners or a baseline attached.

    python -m llava_prune run --pruners DIR --mode hard -m llava.eval.model_vqa_loader <its own arguments>
    python -m llava_prune run --baseline fastv --average_tokens 128 -m llava.eval.model_vqa_loader <its own arguments>

Every LLaVA program loads its model through `llava.model.builder.load_pretrained_model`; that function is wrapped
before the program imports it, and put back afterwards. Nothing else of LLaVA is touched.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .baselines import METHODS
from .checkpoint import read_description, read_weights
from .cuda_to_cpu import CudaToCpu
from .fast import accelerate
from .method import attach_method, check_method
from .sidecar import Sidecar
from .stacks import STACKS, installed_stack
from .state import INFERENCE_MODES


def build_parser() -> argparse.ArgumentParser:
    """Arguments up to `-m` are ours, everything after it is the program's."""
    parser = argparse.ArgumentParser(prog="python -m llava_prune run", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pruners", help="output directory of a pruner training; --mode origin needs none")
    what.add_argument("--baseline", choices=METHODS, help="a training-free method, at --average_tokens")
    parser.add_argument(
        "--average_tokens",
        type=float,
        help="vision tokens an image, averaged over the decoder layers; pruners have a budget of their own",
    )
    parser.add_argument("--mode", choices=INFERENCE_MODES, default="hard", help="origin leaves the model as it is")
    parser.add_argument(
        "--fast", action="store_true", help="run the decoder in CUDA graphs, see llava_prune.accelerate"
    )
    parser.add_argument("--report", help="write one JSON line a sample here: tokens kept, FLOPs, seconds")
    parser.add_argument("--allow_other_base", action="store_true", help="accept a base model under another name")
    parser.add_argument(
        "-m", dest="program", nargs=argparse.REMAINDER, required=True, help="module or .py file, then its arguments"
    )
    return parser


@contextmanager
def pruned_loading(attach: Callable[[nn.Module], Any], report: str | None) -> Iterator[list[nn.Module]]:
    """Within the block, LLaVA's `load_pretrained_model` returns models on which `attach` was called: those given."""
    import torch
    from llava.model import builder

    original = builder.load_pretrained_model
    on_cpu = not torch.cuda.is_available()
    loaded: list[nn.Module] = []

    def load_pretrained_model(*args: Any, **kwargs: Any) -> tuple:
        call = inspect.signature(original).bind(*args, **kwargs)
        if on_cpu:
            call.arguments["device"] = "cpu"
        tokenizer, model, image_processor, context_length = original(*call.args, **call.kwargs)
        if on_cpu:
            model.float()
        attach(model)
        if report:
            Sidecar(model, report, append=bool(loaded))
        loaded.append(model)
        return tokenizer, model, image_processor, context_length

    builder.load_pretrained_model = load_pretrained_model
    try:
        with CudaToCpu() if on_cpu else nullcontext():
            yield loaded
    finally:
        builder.load_pretrained_model = original


def attach_as_asked(args: argparse.Namespace, model: nn.Module) -> None:
    """Attach the pruners or the baseline; exits with a message where the model or the budget does not suit them."""
    try:
        attach_method(model, args.pruners, args.mode, args.baseline, args.average_tokens, args.allow_other_base)
        if args.fast:
            accelerate(model)
    except ValueError as error:
        sys.exit(f"llava_prune: {error}")


def _check_program(program: str, report: str | None) -> None:
    """Raises ValueError for what would only be found wrong once a checkpoint is loaded."""
    if installed_stack() != "llava":
        raise ValueError(f"LLaVA is not installed in this environment: {STACKS['llava']} makes one")
    if program.endswith(".py") and not Path(program).is_file():
        raise ValueError(f"-m {program}: there is no such file")
    if report and Path(report).is_dir():
        raise ValueError(f"--report {report} is a folder: name a file")


def main(argv: list[str]) -> None:
    """Run a program with pruners or a baseline; exits with a message when those can not be had."""
    args = build_parser().parse_args(argv)
    if not args.program:
        sys.exit("llava_prune: -m needs a module (llava.eval.model_vqa_loader) or a .py file")
    program, *rest = args.program
    try:
        _check_program(program, args.report)
        check_method(args.pruners, args.baseline, args.mode, args.average_tokens)
        if args.pruners:
            read_description(args.pruners)
            read_weights(args.pruners)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"llava_prune: {error}")
    if sys.platform == "linux":
        # LLaVA's loader reads a module global in its workers, which only fork hands on
        multiprocessing.set_start_method("fork", force=True)
    for name in ("pruners", "report"):  # the program may go to another folder
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    sys.argv = [program, *rest]
    with pruned_loading(partial(attach_as_asked, args), args.report) as loaded:
        if program.endswith(".py"):
            sys.path.insert(0, str(Path(program).resolve().parent))  # as python does
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    if not loaded:
        sys.exit(
            f"llava_prune: {program} did not load a model by llava.model.builder.load_pretrained_model, so nothing "
            "was attached to any: call load_pruners in it"
        )
