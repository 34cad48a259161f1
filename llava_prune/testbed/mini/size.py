"""The two sizes of mini: of real parts, and of random ones that the tests run the whole pipeline on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PATCH = 14


@dataclass(frozen=True)
class MiniSize:
    """What mini is made of.

    Attributes:
        name: of its folders.
        real: parts of pip packages, or random ones.
        pixels: side of a picture.
        grid: rows and columns of the mosaics that pruners are trained on.
        other_grids: that the base also sees, and that make transfer sets.
        blocks: of the vision encoder. Of DINOv2's 12 those up to the eighth tell color, shape and word well, the last
            does not: see the README.
        text_length: tokens of a conversation after its picture, in the base's training.
        budgets: average tokens that pruners are trained for.
        ablated: the one of the ablations.
        prune: settings of the pruners on top of the preset `mini`.
    """

    name: str
    real: bool
    pixels: int
    grid: tuple[int, int]
    other_grids: tuple[tuple[int, int], ...]
    blocks: int
    text_length: int
    budgets: tuple[float, ...]
    ablated: float
    prune: dict[str, Any] = field(default_factory=dict)

    @property
    def vision_tokens(self) -> int:
        """Of a picture."""
        return (self.pixels // PATCH) ** 2

    def cell(self, grid: tuple[int, int]) -> int:
        """Side of a mosaic's cell in pixels."""
        return self.pixels // max(grid)


REAL = MiniSize(
    name="llava-mini",
    real=True,
    pixels=336,
    grid=(5, 5),
    other_grids=((4, 4), (6, 6), (7, 7)),
    blocks=6,
    text_length=384,
    budgets=(192, 128, 64, 32),
    ablated=64,
)
TINY = MiniSize(
    name="llava-mini-tiny",
    real=False,
    pixels=84,
    grid=(2, 2),
    other_grids=((3, 3),),
    blocks=2,
    text_length=160,
    budgets=(18, 12),
    ablated=12,
    prune={
        "pruning_layers": (1, 2, 3),
        "layer_shares": (1.5, 1, 0.5),
        "token_num_range": (12, 18),
        "disc_layers": (-1,),
        "pruner_rank": 16,
        "pruner_dim": 16,
        "pruner_heads": 2,
    },
)
