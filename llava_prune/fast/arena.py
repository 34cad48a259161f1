"""One block of memory for the key-value caches of whatever is generated: of one generation at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheView:
    """Room for the keys and values of one decoder layer.

    Attributes:
        keys, values: (B, key-value heads, capacity, head width), views of the arena.
    """

    keys: Tensor
    values: Tensor


class Arena:
    """Layers lie one behind the other, each with the capacity it needs; a larger demand moves the block.

    Args:
        heads, width: key-value heads of a layer, and the width of one.
    """

    def __init__(self, heads: int, width: int, dtype: torch.dtype, device: torch.device):
        self.heads, self.width = heads, width
        self._memory = torch.empty(0, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Size of the block."""
        return self._memory.numel() * self._memory.element_size()

    def reserve(self, batch: int, rows: int) -> bool:
        """Make room for `rows` rows a sample, over all layers together; what is there stays.

        Returns:
            Whether the block moved, and views of it are of another block.
        """
        needed = 2 * batch * rows * self.heads * self.width
        if needed <= self._memory.numel():
            return False
        # masked rows weigh 0 in attention, and 0 times what is not a number is not a number
        larger = self._memory.new_zeros(needed)
        larger[: self._memory.numel()].copy_(self._memory)
        self._memory = larger
        return True

    def views(self, batch: int, capacities: list[int]) -> list[CacheView]:
        """Views of layers with these capacities, from the start of the block."""
        views, start = [], 0
        for capacity in capacities:
            size = batch * self.heads * capacity * self.width
            shape = (batch, self.heads, capacity, self.width)
            keys, values = (self._memory[start + i * size : start + (i + 1) * size].view(shape) for i in (0, 1))
            views.append(CacheView(keys, values))
            start += 2 * size
        return views
