"""A batch of prompts packed to the left, in buffers that graphs read."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..layout import TokenLayout, gather_rows, padded_index


@dataclass(frozen=True)
class Widths:
    """Rounded-up sizes of a packed batch, which are the shapes of its graphs.

    Attributes:
        rows, vision, question: rows, vision tokens and question tokens of the fullest sample.
    """

    rows: int
    vision: int
    question: int


@dataclass(frozen=True)
class Prompt:
    """B prompts of S rows, valid ones first.

    Attributes:
        hidden: (B, S, D) input embeddings.
        position: (B, S) long, rotary position.
        index: (B, S) long, place among the T positions that the decoder was given.
        layout: token kinds of the rows.
        counts: (K, B) long, vision tokens that each pruning layer keeps, None where a threshold decides.
    """

    hidden: Tensor
    position: Tensor
    index: Tensor
    layout: TokenLayout
    counts: Tensor | None

    @classmethod
    def pack(
        cls, embeds: Tensor, position: Tensor, layout: TokenLayout, widths: Widths, counts: Tensor | None
    ) -> Prompt:
        """From (B, T, D) embeddings, (B, T) rotary positions and the layout of the T positions."""
        length = layout.valid.shape[1]
        padding = (0, max(widths.rows - length, 0))
        index, valid = padded_index(torch.nn.functional.pad(layout.valid, padding), width=widths.rows)

        def packed(flags: Tensor) -> Tensor:
            return flags.gather(1, index) & valid

        vision, question = packed(layout.vision), packed(layout.question)
        indices = (*padded_index(vision, widths.vision), *padded_index(question, widths.question))
        predicting = None if layout.predicting is None else packed(layout.predicting)
        own = TokenLayout(valid, vision, question, predicting, layout.num_images, *indices, layout.has_vision)
        return cls(gather_rows(embeds, index), position.gather(1, index), index, own, counts)

    def tensors(self) -> list[Tensor]:
        """All that differs between batches of the same shapes."""
        values = [self.hidden, self.position, self.index, self.counts]
        values += [getattr(self.layout, field.name) for field in fields(TokenLayout)]
        return [value for value in values if isinstance(value, Tensor)]

    def shapes(self) -> tuple:
        """What batches must share to take the same buffers."""
        optional = (self.counts is None, self.layout.predicting is None)
        return (*optional, *(tuple(value.shape) for value in self.tensors()))

    def copy_(self, other: Prompt) -> None:
        """Take over a batch of the same shapes."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)
