"""Adaptation: LoRA or the base learns to answer from the tokens that trained pruners keep.

A model that was trained with every vision token misses what is dropped, whatever is kept. Here pruners stay as they
are, tokens are removed as in inference, and the answer's cross-entropy alone trains, at budgets drawn anew for every
step: one adapter serves them all, and a step takes the time of the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .config import PruneConfig
from .patch import PruneHandle, prune_mode
from .state import ForwardRecord


def check_adaptation(config: PruneConfig, start: str | None, lora: bool) -> None:
    """Raises ValueError where pruners are to stay as they are and there are none, or nothing else learns."""
    if start is None:
        raise ValueError("train_pruners False: there are no pruners yet; give trained ones with --prune_start DIR")
    if not (lora or config.train_base):
        raise ValueError("train_pruners False: nothing would learn; add --lora_enable True or --prune_train_base True")


def drawn_budget(config: PruneConfig) -> float | None:
    """Average tokens per image of a step, log-uniform in `token_num_range`; None where the target holds."""
    if config.token_num_range is None:
        return None
    low, high = config.token_num_range
    return round(low * (high / low) ** float(torch.rand(())), 1)


@contextmanager
def adapting(handle: PruneHandle) -> Iterator[None]:
    """A step, its backward pass too: the model in mode `hard`, at a budget of its own."""
    state = handle.state
    state.target_token_num, state.loss_only = drawn_budget(handle.config), True
    try:
        with prune_mode(handle.model, "hard"):
            yield
    finally:
        state.target_token_num, state.loss_only, state.record = None, False, None


def adaptation_metrics(loss: Tensor, record: ForwardRecord, num_layers: int) -> dict[str, Tensor]:
    """What a step notes: the loss, and the share of the vision tokens that entered the layers."""
    counts = record.layout.vision_counts
    with_image = counts > 0
    average = record.tokens_per_layer(num_layers).float().mean(-1)
    ratio = (average / counts.clamp(min=1) * with_image).sum() / with_image.sum().clamp(min=1)
    return {"loss/task": loss, "prune/kept_ratio": ratio, "prune/with_image": with_image.any()}
