"""Attention with a soft mask that learns, beside flash attention without a mask: forward and backward, alone.

Ways to give every key a bias with a gradient: what training uses (`soft_attention`: FlexAttention on a GPU), a channel
more, which needs no compiler, and a mask argument of `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..soft_attention import biased_attention, by_channels
from .floors import time_ms

BATCH = 16
UNMASKED, OURS, CHANNELS, MASKED = "no mask", "ours", "a channel more", "a mask argument"


def attention_times(heads: int, width: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of forward and backward by each way, causal, of `BATCH` samples; the results are compared.

    Args:
        heads: of queries, keys and values alike.
        width: of a head.
        length: tokens of a sample.

    Raises:
        RuntimeError: a way gives other results than the others.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (BATCH, heads, length, width)
    states = [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(3)]
    bias = (-8 * torch.rand(BATCH, length, generator=generator, device=device)).requires_grad_()
    weights = torch.randn(shape, generator=generator, device=device).to(dtype)
    ways: dict[str, Callable[..., Tensor]] = {
        UNMASKED: _unmasked,
        OURS: biased_attention,
        CHANNELS: by_channels,
        MASKED: _masked,
    }
    times, slopes = {}, {}
    for name, way in ways.items():
        inputs = states if name == UNMASKED else [*states, bias]

        def step(way: Callable[..., Tensor] = way, inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
            return torch.autograd.grad(way(*states, bias), inputs, weights)

        times[name] = median(time_ms(step, device))
        slopes[name] = step()[-1].float()
    for name in ways:
        if name not in (UNMASKED, OURS):
            difference = (slopes[name] - slopes[OURS]).norm() / slopes[OURS].norm()
            if not difference < (0.05 if dtype != torch.float32 else 1e-3):
                raise RuntimeError(f"the bias's gradient by {name} differs from ours by {difference:.1%}")
    return times


def _unmasked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _masked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    mask = bias.to(query.dtype)[:, None, None].masked_fill(future, torch.finfo(query.dtype).min)
    return F.scaled_dot_product_attention(query, key, value, mask)


def print_attention(times: dict[str, float], heads: int, width: int, length: int, console: Any) -> None:
    """A row a way."""
    from rich.table import Table

    table = Table(title=f"attention alone, B{BATCH} H{heads} T{length} D{width}, forward and backward")
    for name in ("bias of the keys", "ms", "of no mask"):
        table.add_column(name, justify="right" if name != "bias of the keys" else "left")
    for name, time in times.items():
        table.add_row(name, f"{time:.2f}", f"{time / times[UNMASKED]:.2f}")
    console.print(table)
