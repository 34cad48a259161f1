"""`python -m llava_prune report`: what pruning saves on this machine, origin and hard side by side.

    python -m llava_prune report --model llava-v1.5-7b --pruners DIR --average_tokens 128
    python -m llava_prune report --shape llava-1.5-13b --prune_config avg192      # random weights, no download

Counts are of the prefill; what the times hold is said in `llava_prune.measure`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from ..baselines import METHODS, attach_baseline
from ..checkpoint import load_pruners, read_description, write_atomically
from ..config import PruneConfig
from ..patch import PruneHandle, attach_pruners
from ..stacks import STACKS, stack_of
from .shapes import SHAPES

DTYPES = ("float32", "float16", "bfloat16")
SEED = 0


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `report`."""
    parser = argparse.ArgumentParser(prog="python -m llava_prune report", description=__doc__.splitlines()[0])
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="checkpoint folder, in LLaVA's or Hugging Face's format")
    model.add_argument("--shape", choices=SHAPES, help="instead of --model: this shape with random weights")
    model.add_argument("--stack", choices=STACKS, help="classes of --shape; default: those that are installed")
    model.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda if there is one")
    model.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    model.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2"), default="sdpa")
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument("--pruners", type=Path, help="output directory of a pruner training")
    pruning.add_argument("--baseline", choices=METHODS, help="instead: a training-free method, at --average_tokens")
    pruning.add_argument("--allow_other_base", action="store_true", help="accept a base model under another name")
    pruning.add_argument(
        "--prune_config", help="without --pruners: a preset or file, for untrained pruners of exact budget"
    )
    pruning.add_argument("--average_tokens", type=float, help="keep exactly this budget; default: as configured")
    pruning.add_argument("--mode", choices=("hard", "masked"), default="hard", help="what is measured beside origin")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--question-file", type=Path, help="LLaVA's JSON lines; default: synthetic samples")
    samples.add_argument("--image-folder", type=Path, help="what the question file's pictures are relative to")
    samples.add_argument("--conv-mode", default="v1", help="LLaVA's conversation template (llava stack)")
    samples.add_argument("--text_tokens", type=int, default=64, help="text of a synthetic sample")
    samples.add_argument("--batch_size", type=int, default=1)
    samples.add_argument("--number", type=int, help="samples, the first of a question file; default: four batches")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--new_tokens", type=int, default=16, help="tokens that each call generates, 2 or more")
    timing.add_argument("--warmup", type=int, default=2, help="calls of each batch and mode that are thrown away")
    timing.add_argument("--repeats", type=int, default=5, help="timed calls of each batch and mode")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="write all figures here")
    output.add_argument("--plot", type=Path, help="write a PNG here")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for arguments that can not work, before anything is loaded."""
    if (args.model is None) == (args.shape is None):
        raise ValueError("give either --model DIR or --shape NAME")
    if args.baseline is not None:
        if args.pruners is not None or args.prune_config is not None:
            raise ValueError("--baseline has no pruners: leave out --pruners and --prune_config")
        if args.average_tokens is None:
            raise ValueError("--baseline needs --average_tokens")
    if args.pruners is not None:
        if args.prune_config is not None:
            raise ValueError("--pruners brings its own configuration: leave out --prune_config")
        read_description(args.pruners)
    if (args.question_file is None) != (args.image_folder is None):
        raise ValueError("--question-file and --image-folder belong together")
    if args.question_file is not None and args.shape is not None:
        raise ValueError("--shape knows no words: leave out --question-file, or give --model")
    least = {"batch_size": 1, "number": 1, "text_tokens": 2, "new_tokens": 2, "warmup": 0, "repeats": 1}
    for name, bound in least.items():
        if getattr(args, name) is not None and getattr(args, name) < bound:
            raise ValueError(f"--{name} must be at least {bound}, got {getattr(args, name)}")
    if args.number is not None and args.number % args.batch_size:
        raise ValueError(f"--number {args.number} must be a multiple of --batch_size {args.batch_size}")
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {path.absolute().parent} to write {path.name} to")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG, so {args.plot} must end in .png")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def find_device(name: str | None) -> Any:
    """The `torch.device` of that name, by default the first GPU or else the CPU; raises ValueError."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {error}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"--device {name}: only cpu and cuda are measured")
    if (device.index or 0) >= torch.cuda.device_count() or not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device of that number here")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def load_inputs(args: argparse.Namespace, stack: str, device: Any, dtype: Any) -> Any:
    """The model with what makes its inputs, as `samples.LlavaInputs` or `samples.HfInputs`."""
    from .samples import HfInputs, LlavaInputs
    from .shapes import build_hf, build_llava

    if args.shape is not None:
        shape = SHAPES[args.shape]
        if stack == "llava":
            return LlavaInputs(*build_llava(shape, device, dtype, args.attn), args.conv_mode)
        return HfInputs(*build_hf(shape, device, dtype, args.attn))
    if stack == "hf":
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype, attn_implementation=args.attn)
        return HfInputs(model.to(device).eval(), AutoProcessor.from_pretrained(args.model))
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(args.model))
    if "llava" not in name.lower():
        raise ValueError(f"LLaVA tells its models by their folder's name, which must contain 'llava': not {name!r}")
    loaded = load_pretrained_model(str(args.model), None, name, device=str(device), attn_implementation=args.attn)
    tokenizer, model, image_processor, _ = loaded
    return LlavaInputs(model.to(device, dtype), tokenizer, image_processor, args.conv_mode)


def put_pruners_on(model: Any, args: argparse.Namespace) -> PruneHandle:
    """The baseline, the trained pruners, or untrained ones that keep exactly their budget."""
    if args.baseline is not None:
        return attach_baseline(model, args.baseline, args.average_tokens, "origin")
    if args.pruners is not None:
        return load_pruners(model, args.pruners, "origin", args.allow_other_base, args.average_tokens)
    config = PruneConfig.load(args.prune_config or "default")
    if args.average_tokens is not None:
        config = config.with_budget(args.average_tokens)
    return attach_pruners(model, dataclasses.replace(config, selection="topk", max_keep=None))


def report_on(args: argparse.Namespace) -> dict[str, Any]:
    """Load, measure and sum up; the dict that `--json` writes.

    Raises:
        ValueError, FileNotFoundError: arguments, a checkpoint or a budget that can not be used.
    """
    check(args)
    stack = stack_of(args.model, args.stack)
    import torch
    import transformers

    from .costs import ratios, summarise
    from .measure import Clock, measure, peak_memory_source
    from .samples import make_batches, read_samples, synthetic_samples

    device = find_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    number = args.number or 4 * args.batch_size
    if args.question_file is not None:
        samples = read_samples(args.question_file, args.image_folder, number)
    else:
        samples = synthetic_samples(number, SEED)

    torch.manual_seed(SEED)
    inputs = load_inputs(args, stack, device, dtype)
    handle = put_pruners_on(inputs.model, args)
    batches = make_batches(inputs, samples, args.batch_size, args.text_tokens, SEED)
    modes = ["origin", args.mode]
    measured = measure(handle, modes, batches, args.new_tokens, args.warmup, args.repeats)
    figures = {mode: summarise(handle, mode, measurement) for mode, measurement in measured.items()}
    return {
        "model": {
            "name": args.shape or args.model.resolve().name,
            "weights": "random" if args.shape else "checkpoint",
            "stack": stack,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cpu_threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": args.attn,
            "decoder_layers": handle.num_layers,
        },
        "pruning": {
            "pruners": None if args.pruners is None else str(args.pruners),
            "baseline": args.baseline,
            "average_tokens": args.average_tokens,
            "config": None if handle.config is None else handle.config.to_dict(),
        },
        "samples": {
            "source": "synthetic" if args.question_file is None else str(args.question_file),
            "number": len(samples),
            "batch_size": args.batch_size,
        },
        "timing": {
            "clock": Clock(device).name,
            "memory": peak_memory_source(device),
            "new_tokens": args.new_tokens,
            "warmup": args.warmup,
            "repeats": args.repeats,
            "calls": len(batches) * args.repeats,
        },
        "modes": figures,
        "ratios": ratios(figures[args.mode], figures["origin"]),
    }


def main(argv: list[str]) -> None:
    """Measure, print the tables, write what was asked for."""
    args = build_parser().parse_args(argv)
    try:
        result = report_on(args)
    except (OSError, ValueError) as error:
        sys.exit(f"llava_prune report: {error}")
    from .table import print_report

    print_report(result)
    if args.json is not None:
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(args.json, lambda path: path.write_text(text))
        print(f"wrote {args.json}")
    if args.plot is not None:
        from .plot import draw_report

        draw_report(result, args.plot)
        print(f"wrote {args.plot}")
