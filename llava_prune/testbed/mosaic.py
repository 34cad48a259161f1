"""Mosaics: which pictures lie in which cell, and what is asked about them.

`MosaicSampler` draws them from one split; `paint` turns one into pixels. Neither knows about files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from .pictures import Pictures
from .questions import ALL_WORDINGS, KINDS, WORD_KINDS, Label, answer, compose, subjects, wording


@dataclass(frozen=True)
class Turn:
    """One question about a mosaic and its right answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Mosaic:
    """The indices of the pictures in its cells, row by row, their labels, and the conversation about it."""

    pictures: tuple[int, ...]
    labels: tuple[Label, ...]
    turns: tuple[Turn, ...]


class MosaicSampler:
    """Draws mosaics from one split.

    Args:
        groups: picture indices by label, as `Pictures.by_label` gives them. Mosaics have words if there are pictures
            of words.
        grid: rows and columns, each at least 1.
        rng: the only source of randomness.
        wordings: templates of questions by kind.

    Attributes:
        kinds: of questions that can be asked.

    Raises:
        ValueError: `grid` is not two positive numbers.
    """

    def __init__(
        self,
        groups: dict[Label, list[int]],
        grid: tuple[int, int],
        rng: Random,
        wordings: Mapping[str, Sequence[str]] = ALL_WORDINGS,
    ):
        check_grid(grid)
        self.groups, self.grid, self.rng, self.wordings = groups, grid, rng, wordings
        self.words = tuple(label for label in groups if isinstance(label, str))
        self.kinds = (*KINDS, *WORD_KINDS) if self.words else KINDS

    def draw(self, kind: str, turns: int = 1) -> Mosaic:
        """One mosaic made for a question of `kind`, with `turns - 1` further questions of any kind about it."""
        rows, columns = self.grid
        labels, subject = compose(kind, rows * columns, self.rng, self.words)
        asked = [(kind, subject)]
        while len(asked) < turns:
            kind = self.rng.choice(self.kinds)
            if choices := [s for s in subjects(kind, labels, self.rng) if (kind, s) not in asked]:
                asked.append((kind, self.rng.choice(choices)))
        pictures = tuple(self.rng.choice(self.groups[label]) for label in labels)
        spoken = [
            Turn(k, wording(k, s, columns, self.rng, self.wordings), answer(k, labels, s, columns)) for k, s in asked
        ]
        return Mosaic(pictures, tuple(labels), tuple(spoken))


def paint(pictures: Pictures, mosaic: Mosaic, grid: tuple[int, int], cell: int, side: int | None = None) -> np.ndarray:
    """The pixels of `mosaic`.

    Args:
        pictures: the split that the mosaic was drawn from.
        grid: rows and columns.
        cell: side of one cell in pixels; other than 64 rescales the pictures.
        side: of the whole square picture, white where the cells leave room at the right and below; None for no room.

    Returns:
        (rows * cell, columns * cell, 3) uint8 RGB, or (side, side, 3).

    Raises:
        ValueError: `grid` or `cell` is not positive, or `grid` does not fit the mosaic, or the cells not `side`.
    """
    check_grid(grid, cell)
    rows, columns = grid
    if rows * columns != len(mosaic.pictures):
        raise ValueError(f"grid is {rows} x {columns}, but the mosaic has {len(mosaic.pictures)} cells")
    tiles = resize(pictures.images[list(mosaic.pictures)], cell)
    painted = tiles.reshape(rows, columns, cell, cell, 3).swapaxes(1, 2).reshape(rows * cell, columns * cell, 3)
    if side is None:
        return painted
    if max(painted.shape) > side:
        raise ValueError(f"{rows} x {columns} cells of {cell} pixels do not fit into a picture of side {side}")
    whole = np.full((side, side, 3), 255, np.uint8)
    whole[: rows * cell, : columns * cell] = painted
    return whole


def resize(tiles: np.ndarray, cell: int) -> np.ndarray:
    """(N, side, side, 3) uint8 pictures as (N, cell, cell, 3)."""
    from PIL import Image

    if cell == tiles.shape[1]:
        return tiles
    return np.stack([np.asarray(Image.fromarray(t).resize((cell, cell), Image.Resampling.BICUBIC)) for t in tiles])


def check_grid(grid: tuple[int, int], cell: int = 1) -> None:
    """Raises `ValueError` unless `grid` is two numbers and they and `cell` are at least 1."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is {tuple(grid)}, expected rows and columns, each at least 1")
    if cell < 1:
        raise ValueError(f"cell is {cell}, expected a side of at least 1 pixel")
