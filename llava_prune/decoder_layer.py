"""A Llama-style decoder layer in two halves, around an attention of one's own.

The stock forward fixes how attention is called; where that is what has to change, the layer's own modules are called
here one by one. Both stacks name them alike, and LoRA, ZeRO-3 and quantisation live inside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .compat import apply_rotary

Tables = tuple[Tensor, Tensor]  # cos and sin, (B, S, head width)


def _norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    return norm(hidden)


def _add_norm(norm: nn.Module, hidden: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden + added
    return hidden, norm(hidden)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)


def _mlp(mlp: nn.Module, normed: Tensor) -> Tensor:
    return mlp(normed)


def _pruner(pruner: nn.Module, *inputs: Tensor | None) -> Tensor:
    return pruner(*inputs)


@dataclass(frozen=True)
class Parts:
    """Steps of a layer and before it, which something else may do in fewer kernels.

    Attributes:
        norm: (norm, hidden) -> normed.
        add_norm: (norm, hidden, added) -> their sum, and that normed.
        rotate: (query, key, cos, sin) -> both rotated.
        mlp: (mlp, normed) -> its output.
        pruner: (pruner, *`PrunerInputs`) -> logits.
    """

    norm: Callable[..., Tensor] = _norm
    add_norm: Callable[..., tuple[Tensor, Tensor]] = _add_norm
    rotate: Callable[..., tuple[Tensor, Tensor]] = _rotate
    mlp: Callable[..., Tensor] = _mlp
    pruner: Callable[..., Tensor] = _pruner


PLAIN = Parts()


def project(layer: nn.Module, hidden: Tensor, tables: Tables, parts: Parts = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (B, heads, S, head width), and keys and values (B, key-value heads, S, head width).

    Args:
        hidden: (B, S, D) entering the layer.
        tables: at each row's rotary position.
    """
    attention = layer.self_attn
    normed = parts.norm(layer.input_layernorm, hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    return *parts.rotate(query, key, *tables), value


def attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """`scaled_dot_product_attention` with grouped queries where there are fewer keys than queries."""
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return F.scaled_dot_product_attention(query, key, value, **grouped, **how)


def finish(layer: nn.Module, hidden: Tensor, attended: Tensor, parts: Parts = PLAIN) -> Tensor:
    """What leaves the layer, (B, S, D), from what entered it and (B, heads, S, head width) of attention."""
    added = layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    hidden, normed = parts.add_norm(layer.post_attention_layernorm, hidden, added)
    return hidden + parts.mlp(layer.mlp, normed)
