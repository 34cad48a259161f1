"""VTW: all vision tokens leave at one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..flops import DecoderShape
from ..scoring import LayerView, Scores
from .decoder import DecoderBaseline

if TYPE_CHECKING:
    from ..report import Report
    from .handle import BaselineHandle


class VTW(DecoderBaseline):
    """Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal", AAAI 2025,
    arXiv:2405.05803.

    The layers before K see all vision tokens, those from K on none. Average tokens are K x vision tokens / layers, so
    the budget is rounded down to a whole number of layers, and its floor is that of K = 1.

    The paper takes the first K whose output on a few samples is close to the full model's (KL divergence); the
    published code ends up with K = 15 or 16 of 32. Here the budget alone sets K.
    """

    name = "vtw"
    min_keep = 0

    def __init__(self, handle: BaselineHandle, average_tokens: float):
        tokens = handle.vision_tokens
        if tokens is None:
            raise ValueError(
                "vtw: the layer that a budget stands for follows from the vision tokens of an image, which are not "
                "fixed in this model (any resolution). Use fastv, pyramiddrop or sparsevlm"
            )
        layer = int(average_tokens * handle.num_layers / tokens + 1e-9)
        super().__init__(handle, (min(max(layer, 1), handle.num_layers - 1),))

    def counts(self, tokens: int, average: float) -> tuple[int, ...]:
        """None at all, or all of them where the budget is that large."""
        super().counts(tokens, average)
        return (tokens if average >= tokens else 0,)

    def flops(self, shape: DecoderShape, report: Report) -> Tensor:
        """None: nothing is ranked."""
        return torch.zeros(len(report.text_tokens), dtype=torch.float64)

    def __call__(self, view: LayerView) -> Scores:
        return Scores(view.alive.float())
