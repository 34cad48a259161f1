"""Key-value caches of both stacks: tuples or `Cache` objects in 4.37, layer objects in 5.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def cache_of(call: dict[str, Any]) -> Any:
    """The key-value cache argument, whose name lost nothing but an s on the way to 5.x."""
    return call.get("past_key_values", call.get("past_key_value"))


def cache_length(cache: Any, layer: int) -> int:
    """Cached positions of one layer; 4.37's generate passes tuples to the decoder, `Cache` objects to layers."""
    if cache is None:
        return 0
    if isinstance(cache, tuple):
        return cache[layer][0].shape[-2]
    return int(cache.get_seq_length(layer))


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """Keys and values of every layer of a key-value cache: tuples in 4.37, layer objects in 5.x."""
    for layer in cache if isinstance(cache, tuple) else cache.layers:
        yield from layer[:2] if isinstance(layer, tuple) else (layer.keys, layer.values)


def number_cache(cache: Any, number: int | None) -> None:
    """Write on a layer's key-value cache which record it is of; a copy of it has the number too.

    On layer 0's keys in 4.37, whose generate makes tuples of the cache; there it is gone once beams reorder them.
    """
    if hasattr(cache, "layers"):
        cache.llava_prune_number = number
    elif getattr(cache, "key_cache", None):
        cache.key_cache[0].llava_prune_number = number


def number_of_cache(cache: Any) -> int | None:
    """What `number_cache` wrote, or None."""
    numbered = cache if hasattr(cache, "layers") else cache[0][0]
    return getattr(numbered, "llava_prune_number", None)


def change_cache(cache: Any, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    """Replace keys and values of one layer by what `change` makes of them; nothing to do without a cache.

    Raises:
        ValueError: the layer does not keep them as plain tensors.
    """
    if cache is None:
        return
    if hasattr(cache, "key_cache"):
        cache.key_cache[layer], cache.value_cache[layer] = map(change, cache[layer])
        return
    held = cache.layers[layer]
    if type(held).__name__ != "DynamicLayer":
        raise ValueError(
            f"a pruner before layer {layer} needs its keys and values as they are, and a {type(held).__name__} keeps "
            "them otherwise: use the dynamic cache (leave cache_implementation unset), or prune from layer 1 on"
        )
    held.keys, held.values = change(held.keys), change(held.values)


def check_cache(cache: Any) -> None:
    """Raises ValueError for a cache of fixed length (5.x), which can not hold fewer rows in later layers."""
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"{type(cache).__name__} has a fixed length in every layer, pruning makes later layers shorter: use the "
            "dynamic cache (leave cache_implementation unset), or prune_mode(model, 'origin')"
        )
