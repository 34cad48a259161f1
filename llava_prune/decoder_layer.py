"""A Llama-style decoder layer in two halves, around an attention of one's own.

The stock forward fixes how attention is called; where that is what has to change, the layer's own modules are called
here one by one. Both stacks name them alike, and LoRA, ZeRO-3 and quantisation live inside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .compat import apply_rotary

Tables = tuple[Tensor, Tensor]  # cos and sin, (B, S, head width)


# ---- steps between matrix products


def normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    """The norm of the hidden states."""
    return norm(hidden)


def added_and_normed(norm: nn.Module, hidden: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Their sum, and that normed."""
    hidden = hidden + added
    return hidden, norm(hidden)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both at their rotary positions."""
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)


# ---- a layer


def _as_it_is(step: Callable) -> Callable:
    return step


def _products(linears: Sequence[nn.Module], hidden: Tensor) -> list[Tensor]:
    return [linear(hidden) for linear in linears]


def _mlp(mlp: nn.Module, hidden: Tensor) -> Tensor:
    return mlp(hidden)


@dataclass(frozen=True)
class Parts:
    """What something else may do in fewer kernels, or faster ones.

    Attributes:
        step: (function of tensors and modules) -> one that does the same.
        products: (linears, hidden) -> the output of each.
        mlp: (mlp, normed) -> its output.
    """

    step: Callable[[Callable], Callable] = _as_it_is
    products: Callable[..., list[Tensor]] = _products
    mlp: Callable[..., Tensor] = _mlp


PLAIN = Parts()


def project(layer: nn.Module, hidden: Tensor, parts: Parts = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, S, head width), and keys and values (B, key-value heads, S, head width), not rotated yet.

    Args:
        hidden: (B, S, D) entering the layer.
    """
    attention = layer.self_attn
    hidden = parts.step(normed)(layer.input_layernorm, hidden)
    products = parts.products((attention.q_proj, attention.k_proj, attention.v_proj), hidden)
    return tuple(product.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for product in products)


def attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """`scaled_dot_product_attention` with grouped queries where there are fewer keys than queries."""
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return F.scaled_dot_product_attention(query, key, value, **grouped, **how)


def finish(layer: nn.Module, hidden: Tensor, attended: Tensor, parts: Parts = PLAIN) -> Tensor:
    """What leaves the layer, (B, S, D), from what entered it and (B, heads, S, head width) of attention."""
    added = layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    hidden, entering = parts.step(added_and_normed)(layer.post_attention_layernorm, hidden, added)
    return hidden + parts.mlp(layer.mlp, entering)
