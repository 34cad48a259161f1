"""`python -m llava_prune COMMAND`: each command is a module with `main(argv)`, imported when it is asked for."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "bench": (
        "llava_prune.bench.command",
        "how fast pruned inference is beside the stock model and the device's limit",
    ),
    "compare": ("llava_prune.comparing.command", "trained pruners and baselines at several budgets on one benchmark"),
    "convert": ("llava_prune.convert", "write a LLaVA checkpoint as a Hugging Face model"),
    "report": ("llava_prune.reporting.command", "tokens, FLOPs, cache, times and memory, origin beside hard"),
    "run": ("llava_prune.run", "run a LLaVA program with pruners or a baseline attached"),
    "visualize": ("llava_prune.visualize.command", "draw what each pruning layer keeps of a picture"),
}


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a command; without one, list them."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m llava_prune COMMAND ...\n")
        for name, (_, help) in COMMANDS.items():
            print(f"  {name:<12}{help}")
        return
    name, *rest = argv
    if name not in COMMANDS:
        sys.exit(f"llava_prune: no command {name!r}; there is {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).main(rest)
