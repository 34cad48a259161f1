"""A decoder layer for graphs.

Rows are packed to the left, so causal attention alone keeps valid rows from filler: a prompt needs no mask.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..decoder_layer import Parts, Tables, attend, finish, project, rotated
from .arena import CacheView


def prompt_layer(layer: nn.Module, hidden: Tensor, tables: Tables, cache: CacheView, parts: Parts) -> Tensor:
    """One layer of a prompt, whose keys and values are written to the first S rows of the cache.

    Args:
        hidden: (B, S, D), valid rows first.
        tables: at each row's rotary position.
    """
    query, key, value = project(layer, hidden, parts)
    query, key = parts.step(rotated)(query, key, *tables)
    length = hidden.shape[1]
    cache.keys[:, :, :length].copy_(key)
    cache.values[:, :, :length].copy_(value)
    return finish(layer, hidden, attend(query, key, value, is_causal=True), parts)


def cached_layer(
    layer: nn.Module, hidden: Tensor, tables: Tables, cache: CacheView, place: Tensor, bias: Tensor, parts: Parts
) -> Tensor:
    """One layer of Q new tokens, whose keys and values are written to the cache first.

    Args:
        hidden: (B, Q, D).
        place: (B, Q) long, the row of the cache that each new token takes.
        bias: (B, 1, Q, capacity) in the dtype of `hidden`, 0 where it may attend and -inf elsewhere.
    """
    query, key, value = project(layer, hidden, parts)
    query, key = parts.step(rotated)(query, key, *tables)
    index = place[:, None, :, None].expand_as(key)
    cache.keys.scatter_(2, index, key)
    cache.values.scatter_(2, index, value)
    return finish(layer, hidden, attend(query, cache.keys, cache.values, attn_mask=bias), parts)
