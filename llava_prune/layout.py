"""`TokenLayout`: which positions of a batch are vision, question, text and padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

IGNORE_INDEX = -100


def padded_index(mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the True entries of each row, in order, padded to a common width.

    Args:
        mask: (B, T) bool.
        width: number of columns if known, which saves a device sync; at least the largest count.

    Returns:
        index: (B, K) long, 0 at filler; valid: (B, K) bool. K is at least 1.
    """
    place = mask.cumsum(-1)  # of each True among them, from 1
    counts = place[:, -1:] if mask.shape[1] else mask.sum(-1, keepdim=True)
    if width is None:
        width = int(counts.max()) if len(counts) else 0
    width = max(width, 1)
    # by where each one goes and not by a sort, which is a dozen small kernels on a GPU
    target = torch.where(mask, place - 1, width).clamp(max=width)
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(target)
    index = target.new_zeros(len(mask), width + 1).scatter(1, target, positions)[:, :width]
    return index, torch.arange(width, device=mask.device) < counts


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, T, D) at (B, K) -> (B, K, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def replace_rows(values: Tensor, index: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
    """(B, T, D) with the rows at `index` (B, K) replaced by `rows` (B, K, D) where `valid`; the others as they are."""
    length = values.shape[1]
    target = index.masked_fill(~valid, length)[..., None].expand_as(rows)
    padded = torch.cat([values, values.new_zeros(len(values), 1, values.shape[-1])], 1)
    return padded.scatter(1, target, rows.to(values.dtype))[:, :length]


def marked(index: Tensor, flags: Tensor, width: int) -> Tensor:
    """(B, width) bool, True at the entries of `index` (B, K) whose flag is set; filler points at 0 with no flag."""
    counts = torch.zeros(len(index), width, dtype=torch.int32, device=index.device)
    return counts.scatter_add(1, index, flags.to(torch.int32)) > 0


def placed(index: Tensor, values: Tensor, valid: Tensor, width: int) -> Tensor:
    """(B, width) with `values` (B, K) at `index` (B, K) where `valid`, NaN elsewhere, no gradient."""
    full = values.new_full((len(values), width + 1), float("nan"))
    return full.scatter(1, index.masked_fill(~valid, width), values.detach())[:, :width]


def question_of(valid: Tensor, vision: Tensor, labels: Tensor | None) -> Tensor:
    """(B, T) bool, text after the first vision token and before the first supervised one."""
    question = valid & ~vision & (vision.cumsum(-1) > 0)
    if labels is None:
        return question
    return question & ((question & (labels != IGNORE_INDEX)).cumsum(-1) == 0)


def places_of(vision: Tensor, counts: Tensor, num_images: Tensor, positions: Tensor) -> Tensor:
    """Where in their picture vision tokens lie.

    Args:
        vision: (B, T) bool.
        counts, num_images: (B,) long, vision tokens and images of each sample.
        positions: (B, K) long, of the tokens asked for.

    Returns:
        (B, K, 2) fp32 row and column in (0, 1). The tokens of a picture are taken for a square where their number
        is one, else for a column; pictures for equally large where their tokens can be shared out evenly.
    """
    ordinals = (vision.cumsum(-1) - 1).clamp(min=0).gather(1, positions)
    counts, images = counts[:, None], num_images[:, None].clamp(min=1)
    counts = torch.where(counts % images == 0, counts // images, counts).clamp(min=1)
    ordinals = ordinals % counts
    side = counts.double().sqrt().round().long()
    width = torch.where(side * side == counts, side, torch.ones_like(side))
    row, column = (ordinals // width + 0.5) * width / counts, (ordinals % width + 0.5) / width
    return torch.stack([row, column], -1)


class SampleSize(NamedTuple):
    """One sample in plain numbers.

    Attributes:
        rows: valid positions.
        vision, question, images: vision tokens, tokens of the question, images.
        predicting: vision tokens that a text token is predicted from.
        ends: 1 where the last position is valid, 0 where it is padding.
    """

    rows: int
    vision: int
    question: int
    images: int
    predicting: int
    ends: int

    @property
    def text(self) -> int:
        """Positions that are not vision."""
        return self.rows - self.vision


def sizes_of(
    valid: Tensor, vision: Tensor, question: Tensor, num_images: Tensor, predicting: Tensor
) -> tuple[SampleSize, ...]:
    """Of (B, T) masks and (B,) images; one device sync."""
    masks = torch.stack([valid, vision, question, predicting]).sum(-1)
    rows = (masks[0], masks[1], masks[2], num_images, masks[3], valid[:, -1])
    return tuple(SampleSize(*row) for row in torch.stack(rows, -1).tolist())


@dataclass(frozen=True)
class TokenLayout:
    """Token kinds of one batch of T positions.

    Attributes:
        valid: (B, T) bool, False at padding.
        vision: (B, T) bool.
        question: (B, T) bool, text after the first vision token and before the answer: the supervised one when
            labels are given, else the one to be generated, of which it holds no token (generated without a cache, what
            was generated so far looks like the question).
        predicting: (B, T) bool, vision tokens that a text token is predicted from: the last token of a prompt that
            ends in an image, and the one before a supervised token. None where there are none.
        num_images: (B,) long.
        vision_index, vision_valid: (B, N) position of each sample's vision tokens in order; N is at least 1.
        question_index, question_valid: (B, Q) likewise.
        sizes: of every sample, known without asking the device; empty in a recorded graph, whose batches differ.
        original_counts: (B,) long, vision tokens of each sample before a method reduced them ahead of the decoder, or
            None.
        kept: (B, M) bool, which of those M it kept, or None.
        labels: (B, T) long of a training batch, IGNORE_INDEX where nothing is supervised, or None.
        embeds: to the (B, T, D) embeddings that it is of, where a caller can give those again, or None.
    """

    valid: Tensor
    vision: Tensor
    question: Tensor
    predicting: Tensor | None
    num_images: Tensor
    vision_index: Tensor
    vision_valid: Tensor
    question_index: Tensor
    question_valid: Tensor
    sizes: tuple[SampleSize, ...]
    original_counts: Tensor | None = None
    kept: Tensor | None = None
    labels: Tensor | None = None
    embeds: TensorWeakRef | None = None

    @classmethod
    def build(cls, valid: Tensor, vision: Tensor, num_images: Tensor, labels: Tensor | None = None) -> TokenLayout:
        """From (B, T) masks and, in training, (B, T) labels with IGNORE_INDEX where nothing is supervised."""
        question = question_of(valid, vision, labels)
        read = valid & (valid.flip(-1).cumsum(-1).flip(-1) == 1)
        if labels is not None:
            read[:, :-1] |= (valid & ~vision & (labels != IGNORE_INDEX))[:, 1:]
        predicting = vision & read
        sizes = sizes_of(valid, vision, question, num_images, predicting)
        widest = {kind: max(getattr(size, kind) for size in sizes) for kind in ("vision", "question")}
        indices = (*padded_index(vision, widest["vision"]), *padded_index(question, widest["question"]))
        predicting = predicting if any(size.predicting for size in sizes) else None
        return cls(valid, vision, question, predicting, num_images, *indices, sizes, labels=labels)

    def describes(self, inputs: Tensor | None) -> bool:
        """Whether the decoder's input is the embeddings that this is of, also copied or repeated as hosts do."""
        embeds = None if self.embeds is None else self.embeds()
        if embeds is None or inputs is None or inputs.shape[1:] != embeds.shape[1:]:
            return False
        if inputs is embeds:
            return True
        times, alike = len(inputs) // len(embeds), (inputs.dtype, inputs.device) == (embeds.dtype, embeds.device)
        return alike and torch.equal(inputs, embeds.repeat_interleave(times, 0))

    @property
    def has_vision(self) -> bool:
        """Whether any sample has a vision token."""
        return any(size.vision for size in self.sizes)

    @property
    def text(self) -> Tensor:
        """(B, T) bool, valid positions that are not vision."""
        return self.valid & ~self.vision

    @property
    def text_after_image(self) -> Tensor:
        """(B, T) bool, text that has seen at least one vision token: question and answer."""
        return self.text & (self.vision.cumsum(-1) > 0)

    @property
    def vision_counts(self) -> Tensor:
        """(B,) long, vision tokens of each sample."""
        return self.vision_valid.sum(-1)

    def to(self, device: torch.device) -> TokenLayout:
        """The same on another device."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return TokenLayout(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})

    def repeat(self, times: int) -> TokenLayout:
        """Each sample `times` times in a row, as beam search expands a batch."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        repeated = {k: v.repeat_interleave(times, 0) if isinstance(v, Tensor) else v for k, v in values.items()}
        return TokenLayout(**{**repeated, "sizes": tuple(size for size in self.sizes for _ in range(times))})
