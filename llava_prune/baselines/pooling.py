"""Average pooling of the grid of vision tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .features import FeatureBaseline

if TYPE_CHECKING:
    from .handle import BaselineHandle


class Pooling(FeatureBaseline):
    """2-D adaptive average pooling of the projector's output, as LLaVA-OneVision pools video frames (Li et al. 2024,
    arXiv:2408.03326, bilinear there).

    A pooled grid has whole rows and columns: the largest h x w within the budget with h <= w <= 2 h, so 128 tokens are
    8 x 16 and 40 are 5 x 8; what the budget leaves over stays unused.
    """

    name = "pooling"
    after_projector = True

    def __init__(self, handle: BaselineHandle, average_tokens: float):
        super().__init__(handle, average_tokens)
        self.side = math.isqrt(self.tokens)
        if self.side**2 != self.tokens:
            raise ValueError(f"pooling needs a square grid of vision tokens, this model has {self.tokens} an image")
        self.height, self.width = pooled_grid(self.keep, self.side)
        self.keep = self.height * self.width

    def __call__(self, features: Tensor) -> tuple[Tensor, None]:
        grid = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        pooled = F.adaptive_avg_pool2d(grid.float(), (self.height, self.width)).to(features.dtype)
        return pooled.flatten(2).transpose(1, 2), None


def pooled_grid(count: int, side: int) -> tuple[int, int]:
    """Height and width of the largest grid of at most `count` cells, the squarest of those."""
    grids = [(h, w) for h in range(1, side + 1) for w in range(h, min(2 * h, side) + 1) if h * w <= count]
    return max(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
