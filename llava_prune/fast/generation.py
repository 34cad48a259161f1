"""The generation that is running: where its keys and values lie, and how many rows each layer holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..decoder_layer import Parts, Tables, normed
from .arena import Arena, CacheView
from .layers import cached_layer


@dataclass(frozen=True)
class Caches:
    """Key-value caches of one shape, in fixed memory.

    Attributes:
        spans: layers of each of the K stages.
        widths: rows of the packed prompt in each stage.
        room: new tokens that fit behind them.
        start: (K, B) long, valid rows of the prompt in each stage.
        held: (K, B) long, the same with the new tokens.
        arena: where keys and values lie.
    """

    spans: tuple[int, ...]
    widths: tuple[int, ...]
    room: int
    start: Tensor
    held: Tensor
    arena: Arena

    @cached_property
    def views(self) -> list[CacheView]:
        """Of each layer's cache, as the arena lies now."""
        return self.arena.views(self.batch, capacities(self.spans, self.widths, self.room))

    @property
    def batch(self) -> int:
        """B."""
        return self.start.shape[1]

    def width(self, layer: int) -> int:
        """Rows of the packed prompt in a layer."""
        stages = [width for span, width in zip(self.spans, self.widths, strict=True) for _ in range(span)]
        return stages[layer]

    def widened(self, room: int) -> tuple[Caches, bool]:
        """The same rows in caches with more room, and whether the arena moved."""
        held = [CacheView(view.keys.clone(), view.values.clone()) for view in self.views]
        moved = self.arena.reserve(self.batch, sum(capacities(self.spans, self.widths, room)))
        wider = replace(self, room=room)
        for view, old in zip(wider.views, held, strict=True):
            count = old.keys.shape[2]
            view.keys[:, :, :count].copy_(old.keys)
            view.values[:, :, :count].copy_(old.values)
        return wider, moved


def capacities(spans: tuple[int, ...], widths: tuple[int, ...], room: int) -> list[int]:
    """Cache rows of every layer, for stages of so many layers and packed rows."""
    return [width + room for span, width in zip(spans, widths, strict=True) for _ in range(span)]


@dataclass
class Generation:
    """State between a prefill and its last token.

    Attributes:
        caches: of its prompt and its new tokens.
        prompt_length: T, positions that the decoder was given in the prefill.
        new: tokens since.
    """

    caches: Caches
    prompt_length: int
    new: int = 0

    def rows(self, layer: int) -> int:
        """Rows that the fullest sample has in the cache of a layer."""
        return self.caches.width(layer) + self.new

    def length(self, layer: int) -> int:
        """Positions so far in layer 0 and its stage, which masks and positions are counted from; else rows."""
        return self.prompt_length + self.new if layer < max(self.caches.spans[0], 1) else self.rows(layer)


def decode(
    layers: nn.ModuleList,
    norm: nn.Module,
    tables: Tables,
    caches: Caches,
    hidden: Tensor,
    position: Tensor,
    blocked: Tensor,
    parts: Parts,
) -> tuple[Tensor]:
    """Q new tokens of each sample through all layers, each attending to the rows that its own layer holds.

    Args:
        caches: `held` is that before these tokens, and is left so.
        hidden: (B, Q, D) embeddings.
        position: (B, Q) long, rotary positions.
        blocked: (B, room) bool, new tokens that the attention mask hides.
        parts: of the layers.

    Returns:
        (B, Q, D) after the last norm.
    """
    cosine_sine = tuple(table[position] for table in tables)
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    layer = 0
    for stage, span in enumerate(caches.spans):
        if not span:  # pruners stand before layer 0
            continue
        place = caches.held[stage][:, None] + steps
        columns = torch.arange(caches.widths[stage] + caches.room, device=hidden.device)
        new = columns - caches.start[stage][:, None]  # (B, capacity), number of the new token in each column
        hides = blocked.gather(1, new.clamp(0, caches.room - 1)) & (new >= 0)
        seen = (columns <= place[..., None]) & ~hides[:, None]
        # as numbers, once a stage: attention would make them of flags in every layer
        bias = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, float("-inf"))[:, None]
        for _ in range(span):
            cache = caches.views[layer]
            hidden = cached_layer(layers[layer], hidden, cosine_sine, cache, place, bias, parts)
            layer += 1
    return (parts.step(normed)(norm, hidden),)
