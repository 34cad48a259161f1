"""Physical removal: which rows are still there, and everything that has to shrink with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import padded_index


@dataclass(frozen=True)
class Rows:
    """Rows of the full sequence that are still present, packed to the left.

    Attributes:
        positions: (B, S) long, index into the full sequence of T positions, ascending; 0 at filler.
        valid: (B, S) bool, False at filler. The input's own padding counts as present.
        ragged: whether any filler exists.
    """

    positions: Tensor
    valid: Tensor
    ragged: bool

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device) -> Rows:
        """All `length` rows present."""
        positions = torch.arange(length, device=device).expand(batch, -1)
        return cls(positions, torch.ones_like(positions, dtype=torch.bool), False)

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(self.positions.to(device), self.valid.to(device), self.ragged)

    def complete(self, length: int) -> bool:
        """Whether nothing was removed from a sequence of `length` positions."""
        return not self.ragged and self.positions.shape[1] == length

    def select(self, present: Tensor) -> tuple[Rows, Tensor] | None:
        """Keep the rows where `present` (B, S) is True.

        Returns:
            The new rows and (B, S') the old row of each, or None if every row stays. One device sync.
        """
        present = present & self.valid
        lowest, highest = torch.stack(torch.aminmax(present.sum(-1))).tolist()
        if lowest == self.positions.shape[1]:
            return None
        index, valid = padded_index(present, width=highest)
        positions = self.positions.gather(1, index).masked_fill(~valid, 0)
        return Rows(positions, valid, lowest != highest), index

    def flags(self, mask: Tensor) -> Tensor:
        """(B, S) the entries of a (B, T) bool mask at these rows, False at filler."""
        return mask.gather(1, self.positions) & self.valid

    def take(self, values: Tensor, dim: int) -> Tensor:
        """Entries of (B or 1, .., T, ..) at these rows along `dim`."""
        values = values.expand(len(self.positions), *values.shape[1:])
        shape = [1] * values.dim()
        shape[0], shape[dim] = self.positions.shape
        size = list(values.shape)
        size[dim] = self.positions.shape[1]
        return values.gather(dim, self.positions.view(shape).expand(size))

    def scatter(self, states: Tensor, length: int) -> Tensor:
        """(B, .., S, D) back to (B, .., length, D), zero where rows were removed."""
        target = self.positions.masked_fill(~self.valid, length).to(states.device)
        target = target.view(len(target), *[1] * (states.dim() - 3), -1, 1).expand_as(states)
        full = states.new_zeros(*states.shape[:-2], length + 1, states.shape[-1])
        return full.scatter(-2, target, states)[..., :length, :]
