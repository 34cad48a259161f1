"""Adaptation: LoRA or the base learns to answer from the tokens that trained pruners keep.

A model that was trained with every vision token misses what is dropped, whatever is kept. Here pruners stay as they
are and tokens are removed as in inference, at budgets drawn anew for every step, so that one adapter serves them all.
The answer's cross-entropy trains, beside an alignment with the unpruned pass of the base as it was before. A baseline
can stand where the pruners do, at one budget and by cross-entropy alone: what LoRA gains without learned pruners.

On the testbed of the default run, 600 held-back questions, pruners of `mosaic_guided`, seed 0, 240 steps at 5e-4:

| average tokens of 144 | 144 | 41 | 29 | 14 |
|---|---|---|---|---|
| the base | 99.7 % | 97.8 % | 94.3 % | 52.7 % |
| adapted, no alignment | 97.7 % | 98.5 % | 98.0 % | 89.5 % |
| adapted, kl | 98.3 % | 99.2 % | 98.3 % | 89.8 % |
| adapted, gan, weight 0.1 | 98.5 % | 98.7 % | 97.8 % | 88.7 % |
| adapted, gan, weight 1 | 97.5 % | 98.5 % | 97.7 % | 86.3 % |

On testbed.mini, at 64 of 576 tokens, the base as it is keeps 93.7 % of what it answers with all, an adapted one 99.1 %
(three seeds, test questions). There kl did a little better than no alignment, a rate of 6e-4 better than 3e-4.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import read_weights, write_atomically
from .config import PruneConfig
from .state import ForwardRecord

BASELINE_FILE = "prune_baseline.json"


def check_what_learns(config: PruneConfig, start: str | None, baseline: str | None, lora: bool) -> None:
    """Raises ValueError where nothing would teach what is to learn, or there is not one thing that keeps tokens."""
    if config.train_pruners:
        if config.guidance_only_ratio == 1 and (lora or config.train_base):
            raise ValueError(
                "guidance_only_ratio 1 teaches pruners and nothing else, so LoRA or the base would not learn: train "
                "the pruners without, then adapt to them with --prune_start DIR --prune_train_pruners False "
                "(ADAPT=DIR of train_prune.sh)"
            )
        return
    if start is not None and baseline is not None:
        raise ValueError("give --prune_start DIR or --prune_baseline NAME, not both")
    if start is None and baseline is None:
        raise ValueError("train_pruners False: there are no pruners yet; give trained ones with --prune_start DIR")
    if not (lora or config.train_base):
        raise ValueError("train_pruners False: nothing would learn; add --lora_enable True or --prune_train_base True")


def of_baseline(config: PruneConfig) -> PruneConfig:
    """What a training without pruners takes from a configuration, where a baseline keeps exactly the target.

    Raises:
        ValueError: the target is not a number of tokens.
    """
    if config.target_token_num is None:
        raise ValueError("--prune_baseline keeps a number of tokens: set target_token_num, not target_sparsity")
    exactly = config.with_budget(config.target_token_num)
    return dataclasses.replace(exactly, train_pruners=False, token_num_range=None, alignment="none")


def save_baseline(directory: str | Path, name: str, average_tokens: float) -> None:
    """Say beside an adapter which baseline it is adapted to, in `prune_baseline.json`."""
    path = Path(directory) / BASELINE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"baseline": name, "average_tokens": average_tokens}) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def check_same_baseline(checkpoint: str | Path, name: str, average_tokens: float) -> None:
    """Raises ValueError where a checkpoint was adapted to another baseline, or at another budget."""
    path = Path(checkpoint) / BASELINE_FILE
    written = json.loads(path.read_text()) if path.is_file() else None
    if written != {"baseline": name, "average_tokens": average_tokens}:
        there = f"to {written['baseline']} at {written['average_tokens']:g} tokens" if written else "to no baseline"
        raise ValueError(
            f"{checkpoint} is adapted {there}, not to {name} at {average_tokens:g}: use another output_dir, or remove "
            "the checkpoints"
        )


def check_same_pruners(checkpoint: str | Path, pruners: dict[str, Tensor]) -> None:
    """Raises ValueError where a checkpoint was adapted to other pruners than those given, its weights by name."""
    written = read_weights(checkpoint)
    if written.keys() != pruners.keys() or any(
        not torch.equal(value, pruners[name].to("cpu", value.dtype)) for name, value in written.items()
    ):
        raise ValueError(
            f"{checkpoint} is adapted to other pruners than those of prune_start: use another output_dir, or remove "
            "the checkpoints"
        )


def drawn_budget(config: PruneConfig) -> float | None:
    """Average tokens per image of a step, log-uniform in `token_num_range`; None where the target holds."""
    if config.train_pruners or config.token_num_range is None:
        return None
    low, high = config.token_num_range
    return low * (high / low) ** float(torch.rand(()))


def kept_metrics(record: ForwardRecord, num_layers: int) -> dict[str, Tensor]:
    """What a step notes: the share of the vision tokens that entered the layers, mean over samples with an image."""
    counts = record.vision_tokens
    with_image = counts > 0
    average = record.tokens_per_layer(num_layers).float().mean(-1)
    share = (average / counts.clamp(min=1) * with_image).sum() / with_image.sum().clamp(min=1)
    return {"prune/kept_share": share, "prune/with_image": with_image.any()}


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block the base answers as it did before LoRA; a base that is trained itself as it does now."""
    disable = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()
