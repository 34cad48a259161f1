"""Every n-th vision token."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import FeatureBaseline, take


class Uniform(FeatureBaseline):
    """Tokens at equal strides of the raster order, before the decoder. No paper: the plainest selection.

    Token i of K is the one at (i + 0.5) N / K. Where the stride divides the grid's width this is whole columns.
    """

    name = "uniform"

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        index = (torch.arange(self.keep, device=features.device) * 2 + 1) * self.tokens // (2 * self.keep)
        return take(features, index.expand(len(features), -1))
