"""FastV: after layer K, the vision tokens that the last token attends to least are gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..scoring import LayerView, Scores
from .decoder import DecoderBaseline

if TYPE_CHECKING:
    from .handle import BaselineHandle


class FastV(DecoderBaseline):
    """Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv:2403.06764.

    Vision tokens are ranked once, by the attention that the last question token pays them in the K-th decoder layer
    (index K - 1), averaged over heads; the layers from index K on see the best. K = 2, as in the paper.

    The paper speaks of the attention received from all other tokens; its code, followed here, takes the last token's.
    The published code further ranks by the first sample of a batch, runs layer K twice, materialises its attention
    (eager only), and keeps a ratio of 576 tokens at a fixed place of the prompt.

    Args:
        layer: K, at least 1.
    """

    name = "fastv"
    advice = ", or set layer=1"

    def __init__(self, handle: BaselineHandle, average_tokens: float, layer: int = 2):
        super().__init__(handle, (layer,))
        self.watched = layer - 1

    def watch(self, view: LayerView) -> None:
        view.record.notes["fastv"] = view.attention(*view.last_token)

    def __call__(self, view: LayerView) -> Scores:
        return Scores(view.record.notes["fastv"])
