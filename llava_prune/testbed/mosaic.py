"""Mosaics: which pictures lie in which cell, and what is asked about them.

`MosaicSampler` draws them from one split; `paint` turns one into pixels. Neither knows about files.
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from .pictures import Pictures
from .questions import KINDS, answer, compose, subjects, wording


@dataclass(frozen=True)
class Turn:
    """One question about a mosaic and its right answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Mosaic:
    """The indices of the pictures in its cells, row by row, and the turns of the conversation about it."""

    pictures: tuple[int, ...]
    turns: tuple[Turn, ...]


class MosaicSampler:
    """Draws mosaics from one split.

    Args:
        groups: picture indices by label, as `Pictures.by_label` gives them.
        grid: rows and columns, each at least 1.
        rng: the only source of randomness.

    Raises:
        ValueError: `grid` is not two positive numbers.
    """

    def __init__(self, groups: dict[tuple[str, str], list[int]], grid: tuple[int, int], rng: Random):
        check_grid(grid)
        self.groups, self.grid, self.rng = groups, grid, rng

    def draw(self, kind: str, turns: int = 1) -> Mosaic:
        """One mosaic made for a question of `kind`, with `turns - 1` further questions of any kind about it."""
        rows, columns = self.grid
        labels, subject = compose(kind, rows * columns, self.rng)
        asked = [(kind, subject)]
        while len(asked) < turns:
            kind = self.rng.choice(KINDS)
            if choices := [s for s in subjects(kind, labels, self.rng) if (kind, s) not in asked]:
                asked.append((kind, self.rng.choice(choices)))
        pictures = tuple(self.rng.choice(self.groups[label]) for label in labels)
        spoken = [Turn(k, wording(k, s, columns, self.rng), answer(k, labels, s)) for k, s in asked]
        return Mosaic(pictures, tuple(spoken))


def paint(pictures: Pictures, mosaic: Mosaic, grid: tuple[int, int], cell: int) -> np.ndarray:
    """The pixels of `mosaic`.

    Args:
        pictures: the split that the mosaic was drawn from.
        grid: rows and columns.
        cell: side of one cell in pixels; other than 64 rescales the pictures.

    Returns:
        (rows * cell, columns * cell, 3) uint8 RGB.

    Raises:
        ValueError: `grid` or `cell` is not positive, or `grid` does not fit the mosaic.
    """
    check_grid(grid, cell)
    rows, columns = grid
    if rows * columns != len(mosaic.pictures):
        raise ValueError(f"grid is {rows} x {columns}, but the mosaic has {len(mosaic.pictures)} cells")
    tiles = pictures.images[list(mosaic.pictures)]
    if cell != tiles.shape[1]:
        tiles = np.stack([_resize(tile, cell) for tile in tiles])
    return tiles.reshape(rows, columns, cell, cell, 3).swapaxes(1, 2).reshape(rows * cell, columns * cell, 3)


def check_grid(grid: tuple[int, int], cell: int = 1) -> None:
    """Raises `ValueError` unless `grid` is two numbers and they and `cell` are at least 1."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is {tuple(grid)}, expected rows and columns, each at least 1")
    if cell < 1:
        raise ValueError(f"cell is {cell}, expected a side of at least 1 pixel")


def _resize(tile: np.ndarray, cell: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(tile).resize((cell, cell), Image.Resampling.BICUBIC))
