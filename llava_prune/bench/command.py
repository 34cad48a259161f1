"""`python -m llava_prune bench inference`: how fast pruned inference is, and how fast it could be at most.

python -m llava_prune bench inference --json bench.json            # the 7B shape with random weights, on a GPU
python -m llava_prune bench inference --shape tiny --emulate       # the same code on a CPU, in minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..config import PruneConfig
from ..reporting.command import DTYPES, find_device
from ..reporting.shapes import SHAPES
from ..stacks import STACKS, stack_of


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_prune bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("inference", "training"))
    parser.add_argument(
        "--shape", choices=SHAPES, default="llava-1.5-7b", help="sizes of the model; weights are random"
    )
    parser.add_argument("--stack", choices=STACKS, help="classes of the model; default: those that are installed")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--prune_config", help="preset or file of the pruners; default: avg64, in training avg128")
    parser.add_argument("--average_tokens", type=float, default=64, help="budget of every pruned method, of one image")
    parser.add_argument("--scenarios", help="only these, by number from 1, separated by commas")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each kind, after a warm-up")
    parser.add_argument("--emulate", action="store_true", help="run the graphs' code without graphs, on a CPU")
    parser.add_argument(
        "--no-static", dest="static", action="store_false", help="leave transformers' static cache out"
    )
    parser.add_argument("--bucket", type=int, default=32, help="graphs round rows up to multiples of this")
    parser.add_argument("--batch_size", type=int, default=8, help="of training")
    parser.add_argument("--text_tokens", type=int, default=128, help="of training")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run, print as it goes, and return what `--json` writes.

    Raises:
        ValueError: arguments that can not be used.
    """
    import torch
    import transformers
    from rich.console import Console

    from ..reporting.shapes import build_hf, build_llava

    device = find_device(args.device)
    if device.type != "cuda" and args.what == "inference" and not args.emulate:
        raise ValueError("there are no CUDA graphs on a CPU: add --emulate, with a small --shape")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    stack = stack_of(None, args.stack)
    if args.what == "training" and stack != "hf":
        raise ValueError(
            "bench training runs in Hugging Face's Trainer: make its environment, bash scripts/setup.sh hf"
        )
    torch.manual_seed(0)
    model = (build_llava if stack == "llava" else build_hf)(SHAPES[args.shape], device, dtype, "sdpa")[0]
    console = Console(width=220, highlight=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    console.print(f"[bold]{args.shape}[/bold], random weights, {stack} stack, {dtype}, {name}, {versions}")
    about = {"shape": args.shape, "stack": stack, "device": name, "dtype": str(dtype), "versions": versions}
    measured = (_inference if args.what == "inference" else _training)(model, args, console, stack)
    return {"about": about, **measured}


def _inference(model: Any, args: argparse.Namespace, console: Any, stack: str) -> dict[str, Any]:
    from .floors import measure_rates
    from .inference import SCENARIOS, Settings, run_scenario
    from .table import NOTES, print_rates, print_scenario

    weight = model.get_input_embeddings().weight
    numbers = _numbers(args.scenarios, len(SCENARIOS))
    config = PruneConfig.load(args.prune_config or "avg64")
    # there is no static cache in 4.37, and 5.x compiles it on a GPU alone
    settings = Settings(args.average_tokens, args.repeats, args.emulate, args.static and stack == "hf", args.bucket)
    rates = measure_rates(weight.device, weight.dtype)
    print_rates(rates, console)
    found = {}
    for scenario in (SCENARIOS[number] for number in numbers):
        results = run_scenario(model, scenario, config, settings, rates)
        print_scenario(scenario, results, console)
        found[scenario.name] = [dataclasses.asdict(result) for result in results]
    for line in NOTES:
        console.print(line, style="dim")
    return {"rates": dataclasses.asdict(rates), "scenarios": found}


def _numbers(text: str | None, count: int) -> list[int]:
    """Scenarios counted from 0; all of them without `text`."""
    known = [str(number) for number in range(1, count + 1)]
    asked = known if text is None else text.split(",")
    if wrong := [part for part in asked if part not in known]:
        raise ValueError(f"--scenarios {wrong[0]!r}: name some of {','.join(known)}")
    return [int(part) - 1 for part in asked]


def _training(model: Any, args: argparse.Namespace, console: Any, stack: str) -> dict[str, Any]:
    from ..compat import find_decoder, vision_tokens_per_image
    from .attention import attention_times, print_attention
    from .training import TrainingSettings, compare_steps, print_steps

    config = find_decoder(model).config
    heads, weight = config.num_attention_heads, model.get_input_embeddings().weight
    sizes = (heads, config.hidden_size // heads, vision_tokens_per_image(model) + args.text_tokens)
    attention = attention_times(*sizes, weight.device, weight.dtype)
    print_attention(attention, *sizes, console)
    settings = TrainingSettings(
        batch=args.batch_size,
        text=args.text_tokens,
        steps=args.repeats,
        prune_config=args.prune_config or "avg128",
    )
    results = compare_steps(model, settings)
    print_steps(results, console)
    found = {name: dataclasses.asdict(times) for name, times in results.items()}
    return {"settings": dataclasses.asdict(settings), "attention_ms": attention, "steps": found}


def main(argv: list[str]) -> None:
    """Run the command; exits with a message when something given can not be used."""
    args = build_parser().parse_args(argv)
    try:
        result = bench(args)
    except (ValueError, OSError) as error:
        sys.exit(f"llava_prune bench: {error}")
    if args.json is not None:
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(args.json, lambda path: path.write_text(text))
        print(f"wrote {args.json}")
