"""A decoder layer computed from its own modules, without what makes the stock forward slow to start.

Rows are packed to the left, so causal attention alone keeps valid rows from filler: a prompt needs no mask.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import apply_rotary
from .arena import CacheView

Tables = tuple[Tensor, Tensor]  # cos and sin, (B, S, head width)


def prompt_layer(layer: nn.Module, hidden: Tensor, tables: Tables, cache: CacheView) -> Tensor:
    """One layer of a prompt, whose keys and values are written to the first S rows of the cache.

    Args:
        hidden: (B, S, D), valid rows first.
        tables: at each row's rotary position.
    """
    query, key, value = _project(layer, hidden, tables)
    length = hidden.shape[1]
    cache.keys[:, :, :length].copy_(key)
    cache.values[:, :, :length].copy_(value)
    grouped = query.shape[1] != key.shape[1]
    return _finish(
        layer, hidden, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    )


def cached_layer(
    layer: nn.Module, hidden: Tensor, tables: Tables, cache: CacheView, place: Tensor, allowed: Tensor
) -> Tensor:
    """One layer of Q new tokens, whose keys and values are written to the cache first.

    Args:
        hidden: (B, Q, D).
        place: (B, Q) long, the row of the cache that each new token takes.
        allowed: (B, 1, Q, capacity) bool, what each may attend to.
    """
    query, key, value = _project(layer, hidden, tables)
    index = place[:, None, :, None].expand_as(key)
    cache.keys.scatter_(2, index, key)
    cache.values.scatter_(2, index, value)
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(query, cache.keys, cache.values, attn_mask=allowed, enable_gqa=grouped)
    return _finish(layer, hidden, attended)


def _project(layer: nn.Module, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, (B, heads, S, head width)."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    return apply_rotary(query, *tables), apply_rotary(key, *tables), value


def _finish(layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
