"""PyramidDrop: stages of the decoder, each with a fixed share of the vision tokens of the one before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..budget import layer_spans
from ..scoring import LayerView, Scores
from .decoder import DecoderBaseline

if TYPE_CHECKING:
    from .handle import BaselineHandle


class PyramidDrop(DecoderBaseline):
    """Xing et al., "PyramidDrop", CVPR 2025, arXiv:2410.17247.

    The decoder is cut into four stages of equal length. At the end of each the share lambda of the tokens is kept, of
    highest attention from the last instruction token, computed with the next layer's query and key projections and
    averaged over heads. The paper's lambda is 0.5; here it is solved for the budget.

    The published code gives kept tokens new, consecutive positions and drops of the first image alone; here they keep
    theirs and all images share the budget.

    Args:
        layers: first layers of the later stages; a quarter, a half and three quarters of the decoder if None.
    """

    name = "pyramiddrop"
    advice = ", or set layers=(...) to drop earlier"

    def __init__(self, handle: BaselineHandle, average_tokens: float, layers: tuple[int, ...] | None = None):
        quarters = sorted({max(1, handle.num_layers * stage // 4) for stage in (1, 2, 3)})
        super().__init__(handle, quarters if layers is None else layers)

    def fractions(self, tokens: int, average: float) -> tuple[float, ...]:
        """(lambda, lambda^2, ...) for the budget."""
        spans, low, high = layer_spans(self.layers, self.num_layers), 0.0, 1.0

        def powers(share: float) -> tuple[float, ...]:
            return tuple(share ** (stage + 1) for stage in range(len(spans)))

        room = average * self.num_layers / max(tokens, 1) - self.layers[0]
        for _ in range(60):
            middle = (low + high) / 2
            cost = sum(span * share for span, share in zip(spans, powers(middle), strict=True))
            low, high = (middle, high) if cost <= room else (low, middle)
        return powers(high)

    def __call__(self, view: LayerView) -> Scores:
        return Scores(view.attention(*view.last_token))
