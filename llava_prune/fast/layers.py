"""A decoder layer for graphs.

Rows are packed to the left, so causal attention alone keeps valid rows from filler: a prompt needs no mask.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..decoder_layer import Tables, attend, finish, project
from .arena import CacheView


def prompt_layer(layer: nn.Module, hidden: Tensor, tables: Tables, cache: CacheView) -> Tensor:
    """One layer of a prompt, whose keys and values are written to the first S rows of the cache.

    Args:
        hidden: (B, S, D), valid rows first.
        tables: at each row's rotary position.
    """
    query, key, value = project(layer, hidden, tables)
    length = hidden.shape[1]
    cache.keys[:, :, :length].copy_(key)
    cache.values[:, :, :length].copy_(value)
    return finish(layer, hidden, attend(query, key, value, is_causal=True))


def cached_layer(
    layer: nn.Module, hidden: Tensor, tables: Tables, cache: CacheView, place: Tensor, allowed: Tensor
) -> Tensor:
    """One layer of Q new tokens, whose keys and values are written to the cache first.

    Args:
        hidden: (B, Q, D).
        place: (B, Q) long, the row of the cache that each new token takes.
        allowed: (B, 1, Q, capacity) bool, what each may attend to.
    """
    query, key, value = project(layer, hidden, tables)
    index = place[:, None, :, None].expand_as(key)
    cache.keys.scatter_(2, index, key)
    cache.values.scatter_(2, index, value)
    return finish(layer, hidden, attend(query, cache.keys, cache.values, attn_mask=allowed))
