"""SparseVLM: relevant words of the question rate the vision tokens; the best of the dropped are merged into a few."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..masks import select_best
from ..scoring import LayerView, Scores
from .decoder import DecoderBaseline
from .density_peaks import merge_clusters

if TYPE_CHECKING:
    from ..report import Report
    from .handle import BaselineHandle

SHARES = (300 / 576, 200 / 576, 110 / 576)  # of the published code at 192 average tokens
RECYCLED, CLUSTERS = 0.3, 0.1  # share of the dropped tokens that is recycled, clusters a recycled token


class SparseVLM(DecoderBaseline):
    """Zhang et al., "SparseVLM", ICML 2025, arXiv:2410.04417.

    Raters are the question tokens whose similarity to the vision tokens at the decoder's input (softmax over the
    question, mean over vision tokens) is at least average. At a pruning layer a vision token's score is the attention
    that the raters pay it, mean over raters and heads. Of the tokens under the cut the best 30 % are recycled:
    density peak clustering, one mean token a cluster.

    The paper takes the count of each layer from the rank of the raters' attention; the published code does not once a
    token number is asked for, and has lists for 192, 128 and 64, at layers 2, 6 and 15 of 32. Here the layers are
    these, in proportion, and share any budget as the list for 192 does. That code counts the recycled tokens on top
    of the budget (204 for 192); here they are within it, and stand at their cluster's centre. The paper sums a
    cluster, the code and this average it.
    """

    name = "sparsevlm"
    watched = 0

    def __init__(self, handle: BaselineHandle, average_tokens: float):
        layers = [max(1, round(handle.num_layers * layer / 32)) for layer in (2, 6, 15)]
        super().__init__(handle, sorted(set(layers)))

    def fractions(self, tokens: int, average: float) -> tuple[float, ...]:
        """Those of the published list for 192 tokens."""
        return SHARES[-len(self.layers) :]

    def raters(self, report: Report) -> Tensor:
        """All of the question and the last token, which are filler where they do not rate."""
        return report.question_tokens + 1

    def watch(self, view: LayerView) -> None:
        similarity = view.vision.float() @ view.question.float().transpose(1, 2)
        similarity = similarity.masked_fill(~view.question_valid[:, None], torch.finfo(torch.float32).min)
        vision = view.alive.float() / view.alive.sum(-1, keepdim=True).clamp(min=1)
        relevance = torch.einsum("bnq,bn->bq", similarity.softmax(-1), vision) * view.question_valid
        mean = relevance.sum(-1, keepdim=True) / view.question_valid.sum(-1, keepdim=True).clamp(min=1)
        view.record.notes["raters"] = (relevance >= mean) & view.question_valid

    def __call__(self, view: LayerView) -> Scores:
        raters, (last, exists) = view.record.notes["raters"], view.last_token
        exists = exists & ~raters.any(-1, keepdim=True)  # without a question the last token rates
        score = view.attention(torch.cat([view.question_index, last], 1), torch.cat([raters, exists], 1))
        dropped = view.alive.sum(-1) - view.counts
        clusters = torch.where(dropped > 0, (dropped * RECYCLED * CLUSTERS).long() + 1, 0)
        clusters = torch.minimum(clusters, view.counts // 2)  # of a small budget most goes to whole tokens
        kept = select_best(score, view.alive, view.counts - clusters)
        spare = view.alive & ~kept
        pool = select_best(score, spare, torch.maximum((spare.sum(-1) * RECYCLED).long() + 1, clusters))
        centres, vision = merge_clusters(view.vision, pool, clusters)
        return Scores(score.masked_fill(kept | centres, torch.inf), vision=vision)
