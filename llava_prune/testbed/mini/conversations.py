"""What mini's base is trained on: endless conversations, as token ids made on CPU workers, about pictures to paint.

A conversation asks as many questions about its picture as fit, so that the picture's tokens are paid for once.
Listings ("What is in row 2?" - "red circle, star, ...") are of training alone: each of their tokens tells what lies
where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..mosaic import MosaicSampler, Turn
from ..questions import KINDS, WORD_KINDS, Label
from .size import MiniSize
from .wordings import TRAINED

WHOLE = (1, 1)
LISTING, PLAIN = "listing", "plain"
ALL_KINDS = (*KINDS, *WORD_KINDS, PLAIN, LISTING)
MAIN_SHARE, PLAIN_SHARE = 0.8, 0.08  # of the batches; the rest is of the other grids
MOST_TURNS = 30
LISTING_LENGTH, LISTING_ROOM = 256, 48  # tokens of listings alone, and of one line of a mosaic
RARE = ("color_of", "color_of", "count_shape")  # few mosaics allow them unless they are made for them
TurnIds = Callable[[str, str, bool], "tuple[list[int], int]"]


@dataclass(frozen=True)
class Batch:
    """B conversations about pictures of one grid, and M answer tokens in all of them.

    Attributes:
        grid: rows and columns.
        cells: (B, rows x columns) long, picture indices.
        ids: (B, T) long, the text after the picture, padded with 0.
        places: (M,) long, where the answers' tokens are in `ids`, flattened.
        turns: (M,) long, number of the turn that a token belongs to, counted over the batch.
        kinds: (turns,) long, index in `ALL_KINDS`.
    """

    grid: tuple[int, int]
    cells: Tensor
    ids: Tensor
    places: Tensor
    turns: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        tensors = (value.to(device, non_blocking=True) for value in (self.cells, self.ids, self.places, self.turns))
        return Batch(self.grid, *tensors, self.kinds.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by a `DataLoader` that pins."""
        tensors = (value.pin_memory() for value in (self.cells, self.ids, self.places, self.turns, self.kinds))
        return Batch(self.grid, *tensors)


def conversation_ids(tokenizer: Any) -> tuple[list[int], TurnIds]:
    """A conversation as mini's chat template and tokenizer make it, cut into parts that are fast to put together.

    Returns:
        The ids before the picture, and a function `turn(question, answer, first)` that gives the ids of one turn after
        the picture and how many of them at the end are the answer's, what ends it included.
    """
    opening = tokenizer("<|im_start|>user\n").input_ids

    @cache
    def turn(question: str, answer: str, first: bool) -> tuple[list[int], int]:
        asked = f"\n{question}" if first else f"<|im_start|>user\n{question}"
        asked = tokenizer(f"{asked}<|im_end|>\n<|im_start|>assistant\n").input_ids
        answered = tokenizer(f"{answer}<|im_end|>\n").input_ids
        return asked + answered, len(answered)

    return opening, turn


def said(label: Label) -> str:
    """A cell in words."""
    return label if isinstance(label, str) else f"{label[1]} {label[0]}"


def row_listing(labels: Sequence[Label], columns: int, row: int) -> Turn:
    """What is in a row, cell by cell; rows count from 0 here."""
    return Turn(LISTING, f"What is in row {row + 1}?", _joined(labels[row * columns :][:columns]))


def column_listing(labels: Sequence[Label], columns: int, column: int) -> Turn:
    """Likewise for a column."""
    return Turn(LISTING, f"What is in column {column + 1}?", _joined(labels[column::columns]))


def whole_listing(labels: Sequence[Label], columns: int, rng: Random) -> list[Turn]:
    """Every cell once, so that nothing can be copied from the text before: at once, row by row or column by column."""
    rows, way = len(labels) // columns, rng.randrange(3)
    if way == 0 or len(labels) == 1:
        return [Turn(LISTING, "Describe the picture.", _joined(labels))]
    if way == 1:
        return [row_listing(labels, columns, row) for row in rng.sample(range(rows), rows)]
    return [column_listing(labels, columns, column) for column in rng.sample(range(columns), columns)]


def _joined(labels: Sequence[Label]) -> str:
    return ", ".join(map(said, labels))


class Conversations(IterableDataset):
    """Endless `Batch`es, each of one grid.

    Args:
        groups: picture indices by label.
        plain: of each picture that may be shown alone, by its index, label and turns.
        turn: as made by `conversation_ids`.
        size: grids and length of the text.
        batch_size: conversations a batch.
        listings: listings alone (for the projector), or questions with a listing among them.
        seed: each worker draws its own stream from it.
    """

    def __init__(
        self,
        groups: dict[Label, list[int]],
        plain: list[tuple[int, Label, list[Turn]]],
        turn: TurnIds,
        size: MiniSize,
        batch_size: int,
        listings: bool,
        seed: int,
    ):
        self.groups, self.plain, self.turn, self.size = groups, plain, turn, size
        self.batch_size, self.listings, self.seed = batch_size, listings, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = Random(f"{self.seed} {self.listings} {worker.id if worker else 0}")
        grids = (self.size.grid, *self.size.other_grids)
        samplers = {grid: MosaicSampler(self.groups, grid, rng, TRAINED) for grid in grids}
        while True:
            yield self._batch(self._grid(rng), samplers, rng)

    def _grid(self, rng: Random) -> tuple[int, int]:
        toss = rng.random()
        if toss < MAIN_SHARE:
            return self.size.grid
        return WHOLE if toss < MAIN_SHARE + PLAIN_SHARE else rng.choice(self.size.other_grids)

    def _batch(self, grid: tuple[int, int], samplers: dict, rng: Random) -> Batch:
        length = LISTING_LENGTH if self.listings else self.size.text_length
        length = min(length, self.size.text_length)
        ids = torch.zeros(self.batch_size, length, dtype=torch.long)
        cells, places, turns, kinds = [], [], [], []
        for row in range(self.batch_size):
            pictures, asked = self._conversation(grid, samplers, rng)
            cells.append(pictures)
            text: list[int] = []
            for each in asked:
                last = each.kind == LISTING
                # a listing is hardly ever the same again
                make = self.turn.__wrapped__ if last else self.turn
                part, answer = make(each.question, each.answer, not text)
                if len(text) + len(part) > length - (0 if last else LISTING_ROOM):
                    continue
                text += part
                end = row * length + len(text)
                places += range(end - answer, end)
                turns += [len(kinds)] * answer
                kinds.append(ALL_KINDS.index(each.kind))
            ids[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        return Batch(grid, torch.tensor(cells), ids, *map(torch.tensor, (places, turns, kinds)))

    def _conversation(self, grid: tuple[int, int], samplers: dict, rng: Random) -> tuple[tuple[int, ...], list[Turn]]:
        """Pictures and turns, more of them than fit."""
        if grid == WHOLE:
            index, label, asked = rng.choice(self.plain)
            if self.listings:
                return (index,), whole_listing([label], 1, rng)
            return (index,), rng.sample(asked, len(asked))
        sampler = samplers[grid]
        mosaic = sampler.draw(rng.choice((*sampler.kinds, *RARE)), 1 if self.listings else MOST_TURNS)
        if self.listings:
            return mosaic.pictures, whole_listing(mosaic.labels, grid[1], rng)
        # a listing comes last, or it would answer what is asked after it
        list_line, count = rng.choice(((row_listing, grid[0]), (column_listing, grid[1])))
        line = list_line(mosaic.labels, grid[1], rng.randrange(count))
        return mosaic.pictures, [*mosaic.turns, line]
