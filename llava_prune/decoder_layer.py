"""A Llama-style decoder layer in two halves, around an attention of one's own.

The stock forward fixes how attention is called; where that is what has to change, the layer's own modules are called
here one by one. Both stacks name them alike, and LoRA, ZeRO-3 and quantisation live inside of them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .compat import apply_rotary

Tables = tuple[Tensor, Tensor]  # cos and sin, (B, S, head width)


def project(layer: nn.Module, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (B, heads, S, head width), and keys and values (B, key-value heads, S, head width).

    Args:
        hidden: (B, S, D) entering the layer.
        tables: at each row's rotary position.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    return apply_rotary(query, *tables), apply_rotary(key, *tables), value


def attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """`scaled_dot_product_attention` with grouped queries where there are fewer keys than queries."""
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return F.scaled_dot_product_attention(query, key, value, **grouped, **how)


def finish(layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """What leaves the layer, (B, S, D), from what entered it and (B, heads, S, head width) of attention."""
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
