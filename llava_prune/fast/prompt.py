"""A batch of prompts in fixed memory: as it was given, and packed to the left by a graph of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import TokenLayout, padded_index


class Widths(NamedTuple):
    """Rounded-up sizes of a batch, which are the shapes of its graphs.

    Attributes:
        length: positions that the decoder was given.
        rows, vision, question: valid positions, vision tokens and question tokens of the fullest sample.
    """

    length: int
    rows: int
    vision: int
    question: int


class Prompt(NamedTuple):
    """B prompts of S rows, valid ones first.

    Attributes:
        hidden: (B, S, D) input embeddings.
        position: (B, S) long, rotary position.
        index: (B, S) long, place among the T positions that the decoder was given.
        tokens: fields of the rows' `TokenLayout`, without those that are None.
        counts: (K, B) long, vision tokens that each pruning layer keeps, None where a threshold decides.
    """

    hidden: Tensor
    position: Tensor
    index: Tensor
    tokens: dict[str, Tensor]
    counts: Tensor | None

    @property
    def layout(self) -> TokenLayout:
        """Token kinds of the rows."""
        return TokenLayout(**{"predicting": None, **self.tokens}, sizes=())


@dataclass(frozen=True)
class Given:
    """Buffers of one shape, which every batch of that shape is copied to: the graphs read them.

    Attributes:
        widths: of the shape.
        position: (B, T) long, rotary position.
        kinds: (3 or 4, B, T) bool: valid, vision, question, and if there are any the vision tokens that a text token
            is predicted from.
        num_images: (B,) long.
        counts, hidden: of the `Prompt`; embeddings are copied once, to where they are packed.
    """

    widths: Widths
    position: Tensor
    kinds: Tensor
    num_images: Tensor
    counts: Tensor | None
    hidden: Tensor

    @classmethod
    def of(cls, embeds: Tensor, kinds: int, counts: Tensor | None, widths: Widths) -> Given:
        """For batches like (B, T, D) embeddings and (K, B) counts."""
        batch, device = len(embeds), embeds.device
        return cls(
            widths,
            torch.zeros(batch, widths.length, dtype=torch.long, device=device),
            torch.zeros(kinds, batch, widths.length, dtype=torch.bool, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
            None if counts is None else torch.empty_like(counts, memory_format=torch.contiguous_format),
            embeds.new_zeros(batch, widths.rows, embeds.shape[-1]),
        )

    @cached_property
    def prompt(self) -> Prompt:
        """The batch, packed, in the same tensors every time."""
        return self._in_order()

    def fill(self, position: Tensor, kinds: list[Tensor], num_images: Tensor, counts: Tensor | None) -> None:
        """Take over a batch of T positions or fewer; what is beyond them is not valid."""
        length = position.shape[1]
        self.position[:, :length].copy_(position)
        self.kinds[:, :, :length].copy_(torch.stack(kinds))
        self.kinds[:, :, length:].zero_()
        self.num_images.copy_(num_images)
        if counts is not None:
            self.counts.copy_(counts)

    def pack(self) -> Prompt:
        """Write all of `prompt` but its hidden states."""
        packed = self._in_order()
        pairs = [(self.prompt.position, packed.position), (self.prompt.index, packed.index)]
        pairs += [(self.prompt.tokens[name], value) for name, value in packed.tokens.items()]
        for kept, value in pairs:
            kept.copy_(value)
        return self.prompt

    def _in_order(self) -> Prompt:
        index, valid = padded_index(self.kinds[0], width=self.widths.rows)
        vision, question, *predicting = (flags.gather(1, index) & valid for flags in self.kinds[1:])
        vision_index, vision_valid = padded_index(vision, self.widths.vision)
        question_index, question_valid = padded_index(question, self.widths.question)
        tokens = {
            "valid": valid,
            "vision": vision,
            "question": question,
            "num_images": self.num_images.clone(),
            "vision_index": vision_index,
            "vision_valid": vision_valid,
            "question_index": question_index,
            "question_valid": question_valid,
        }
        if predicting:
            tokens["predicting"] = predicting[0]
        return Prompt(self.hidden, self.position.gather(1, index), index, tokens, self.counts)
