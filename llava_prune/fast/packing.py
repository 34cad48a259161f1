"""Packing: every batch goes to the memory that the graphs of its shapes read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import SampleSize, TokenLayout
from .graphs import Graphs
from .prompt import Given, Prompt, Widths


class Packing:
    """Packs batches, those of one shape into the same tensors.

    Args:
        graphs: where the packing is recorded; as many shapes are kept as there may be graphs.
        bucket: sizes are rounded up to multiples of this.
    """

    def __init__(self, graphs: Graphs, bucket: int):
        self.graphs, self.bucket = graphs, bucket
        self._given: dict[Any, Given] = {}
        self._sent: tuple[list[Any], Tensor] | None = None

    def clear(self) -> None:
        """Forget all shapes; graphs that read them must go too."""
        self._given.clear()
        self._sent = None

    def rounded(self, size: int) -> int:
        """`size` rows, rounded up."""
        return max(-(-size // self.bucket), 1) * self.bucket

    def __call__(
        self, embeds: Tensor, position: Tensor, layout: TokenLayout, budgets: list[tuple[int, ...] | None]
    ) -> Prompt:
        """The batch, valid rows first.

        Args:
            embeds, position: (B, T, D) input embeddings, (B, T) rotary positions.
            layout: of the T positions.
            budgets: of each sample, vision tokens that each pruning layer keeps, or None (threshold).
        """
        kinds = [layout.valid, layout.vision, layout.question]
        if layout.predicting is not None:
            kinds.append(layout.predicting)
        widths, counts = self._widths(embeds.shape[1], layout.sizes), self._counts(budgets, embeds.device)
        key = (len(embeds), len(kinds), None if counts is None else len(counts), widths)
        if key not in self._given:
            if len(self._given) >= self.graphs.limit:
                self._given.clear()
                self.graphs.clear()
            self._given[key] = Given.of(embeds, len(kinds), counts, widths)
        given = self._given[key]
        given.fill(position, kinds, layout.num_images, counts)
        prompt = given.prompt  # made before the graph that writes to it
        self.graphs.get(("pack", key), given.pack)()
        index = prompt.index[..., None].expand_as(prompt.hidden)
        torch.gather(embeds, 1, index, out=prompt.hidden)
        return prompt

    def _widths(self, length: int, sizes: tuple[SampleSize, ...]) -> Widths:
        fullest = SampleSize(*map(max, zip(*sizes, strict=True)))
        rows, vision, question = map(self.rounded, (fullest.rows, fullest.vision, fullest.question))
        return Widths(self.rounded(length), rows, min(vision, rows), min(question, rows))

    def _counts(self, budgets: list[Any], device: torch.device) -> Tensor | None:
        """(K, B) long, the budgets on the device, sent again only where they differ from the last batch's."""
        if budgets[0] is None:
            return None
        if self._sent is None or budgets != self._sent[0]:
            self._sent = (budgets, torch.tensor(budgets, device=device).T)
        return self._sent[1]
