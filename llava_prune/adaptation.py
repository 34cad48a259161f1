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

On testbed.mini, at 64 of 576 tokens, the base as it is keeps 89.5 % of what it answers with all, an adapted one 98.8 %
(three seeds, test questions). There kl did a little better than no alignment, a rate of 6e-4 better than 3e-4.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .config import PruneConfig
from .state import ForwardRecord


def check_adaptation(config: PruneConfig, start: str | None, baseline: str | None, lora: bool) -> None:
    """Raises ValueError where nothing is there that keeps tokens, or more than one thing, or nothing else learns."""
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
