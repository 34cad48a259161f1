"""Attention with a bias on every key that has a gradient.

In training on a GPU FlexAttention does it for wide heads (`flex`), elsewhere fused kernels that know of no bias:
softmax(q k / sqrt(d) + b) is the attention of queries with one more channel, of ones, and of keys with one more, of
b sqrt(d). So flash attention gives the bias its gradient by way of the keys, and no (B, H, T, T) matrix is made, where
`scaled_dot_product_attention` with a mask that needs a gradient makes several.

On one CPU core at B8 H4 T188 D32 forward and backward take 8.0 ms, with a mask 16.1 ms, without any bias 6.1 ms.

FlexAttention adds the bias to the scores. Compiled for one length it is the faster one on a GPU; compiled for lengths
that differ its backward pass is not. One H100, bf16, B16 T622 D64, 9 heads (3 of keys; 9):

| forward and backward, ms | 9 and 3 | 9 and 9 |
|---|---|---|
| without a bias | 0.23 | 0.25 |
| a channel more | 1.19 | 0.92 |
| the same by cuDNN | 1.16 | 1.07 |
| FlexAttention for one length | 0.46 | 0.57 |
| FlexAttention for any length | 1.93 | 1.40 |
| the same, its bias without a gradient | 0.42 | 0.95 |

Lengths rounded up to multiples of 64, a program each; another H100, forward and backward, ms:

| | B16 H32 D128, T704 | T690 | B16 H9 D64, T622 |
|---|---|---|---|
| without a bias | 0.99 | 0.98 | 0.31 |
| FlexAttention, rounded up | 2.03 | 2.62 | 1.75 |
| a channel more | 3.45 | 3.47 | 1.47 |
| a mask argument | 5.63 | 5.70 | 1.06 |

What is between 704 and 690 are the copies that rounding up takes. Narrow heads keep the channel; a mask argument would
be faster for them here, but its memory grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder_layer import Tables, attend, finish, project, rotated
from .flex import causal_flex

HIDDEN = -1e3  # bias of what is not there: a weight of 0 in any dtype, and finite times sqrt(d) in half precision
CUDA_MULTIPLE = 8  # widths that fused CUDA kernels take


def biased_layer(
    layer: nn.Module,
    hidden: Tensor,
    tables: Tables,
    bias: Tensor | None,
    gate: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """One decoder layer whose attention is causal.

    Args:
        hidden: (B, T, D) entering the layer.
        tables: cos and sin, (B, T, head width).
        bias: (B, T) fp32, on every key, or None.
        gate: (B, T) fp32, times every value, or None.
        compiled: by torch.compile as a whole, at the first shape and once more for all others.

    Returns:
        (B, T, D).
    """
    return (_compiled_layer() if compiled else _layer)(layer, hidden, tables, bias, gate)


def check_compilable(decoder: nn.Module) -> None:
    """Raises ValueError where LoRA or quantisation lies in the decoder's layers, which was not tried compiled."""
    projections = (
        part for layer in decoder.layers for block in (layer.self_attn, layer.mlp) for part in block.children()
    )
    others = {type(part).__name__ for part in projections if list(part.parameters()) and type(part) is not nn.Linear}
    if others:
        raise ValueError(
            f"compile_layers needs plain layers, the decoder has {', '.join(sorted(others))}: leave it out"
        )


@cache
def _compiled_layer() -> Callable[..., Tensor]:
    return torch.compile(_layer)


def _layer(layer: nn.Module, hidden: Tensor, tables: Tables, bias: Tensor | None, gate: Tensor | None) -> Tensor:
    query, key, value = project(layer, hidden)
    query, key = rotated(query, key, *tables)
    if gate is not None:
        value = value * gate[:, None, :, None].to(value.dtype)
    if bias is None:
        return finish(layer, hidden, attend(query, key, value, is_causal=True))
    return finish(layer, hidden, biased_attention(query, key, value, bias))


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """(B, heads, T, d) of causal attention with `bias` (B, T) fp32 on the keys, scaled by 1 / sqrt(d)."""
    # inside of a program for any length FlexAttention is no faster
    if bias.requires_grad and not torch.compiler.is_compiling():
        if causal_flex().suits(query, key):
            return causal_flex()(query, key, value, bias)
    return by_channels(query, key, value, bias)


def by_channels(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The same in kernels that know of no bias, everywhere."""
    width = query.shape[-1]
    channels = _channels(bias * width**0.5, query.dtype)  # (B, S, 1 or 2)
    total = width + channels.shape[-1]
    if query.is_cuda:
        total = -(-total // CUDA_MULTIPLE) * CUDA_MULTIPLE
    ones = query.new_ones(1).expand(*query.shape[:-1], channels.shape[-1])
    biases = channels[:, None].expand(-1, key.shape[1], -1, -1)
    queries, keys = (_widened(torch.cat(pair, -1), total) for pair in ((query, ones), (key, biases)))
    attended = attend(queries, keys, _widened(value, total), is_causal=True, scale=width**-0.5)
    return attended[..., :width]


def _channels(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, C) in `dtype` that add up to the bias: in half precision a second one holds what rounding took."""
    rounded = bias.to(dtype)
    if dtype == torch.float32:
        return rounded[..., None]
    rest = (bias.detach() - rounded.detach().float()).to(dtype)
    return torch.stack([rounded, rest], -1)


def _widened(states: Tensor, width: int) -> Tensor:
    return F.pad(states, (0, width - states.shape[-1]))
