"""Which code base a model belongs to: `llava` (transformers 4.37.2) or `hf` (transformers 5.x)."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

STACKS = {"llava": "bash scripts/setup.sh", "hf": "bash scripts/setup.sh hf"}


def installed_stack() -> str:
    """By transformers' version as well: in LLaVA's checkout its folder would do for an installed package."""
    old = int(version("transformers").split(".")[0]) < 5
    return "llava" if old and importlib.util.find_spec("llava") is not None else "hf"


def stack_of(model: Path | None, wanted: str | None) -> str:
    """`llava` or `hf`, by the checkpoint's format, or else as wanted, or else as installed.

    Args:
        model: a checkpoint folder, or None where there is none to look into.
        wanted: what the user named, or None.

    Raises:
        FileNotFoundError: neither `config.json` nor `adapter_config.json` in `model`.
        ValueError: the checkpoint is of the other stack than wanted, or its stack is not installed here.
    """
    installed = installed_stack()
    stack = wanted or installed
    if model is not None:
        path = model / "config.json"
        adapter = not path.is_file() and (model / "adapter_config.json").is_file()  # LLaVA's hold a config.json too
        if not adapter and not path.is_file():
            raise FileNotFoundError(f"no {path}: --model takes a checkpoint folder")
        stack = "hf" if adapter or "vision_config" in json.loads(path.read_text()) else "llava"
        if wanted not in (None, stack):
            raise ValueError(f"{model} is a checkpoint of the {stack} stack: leave out --stack {wanted}")
    if stack != installed:
        raise ValueError(f"the {stack} stack is not installed in this environment: {STACKS[stack]} makes one")
    return stack
