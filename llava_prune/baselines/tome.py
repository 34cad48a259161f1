"""ToMe: the most similar vision tokens are merged, a few at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import FeatureBaseline

STEPS = 24  # as many as CLIP-L has blocks


class ToMe(FeatureBaseline):
    """Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461.

    Bipartite soft matching: tokens alternate between two sets, each of the first is matched with the most similar of
    the second, and the best r pairs become their mean, weighted by the tokens each stands for. Repeated until the
    budget is met, tokens staying in sequence.

    The published code merges inside the vision tower, r tokens a block, by the similarity of the attention keys, and
    counts merged tokens in the softmax. Here the finished features are merged before the projector, by their own
    similarity, in as many steps; nothing of the tower changes.
    """

    name = "tome"

    def __call__(self, features: Tensor) -> tuple[Tensor, None]:
        return merge_tokens(features, self.keep), None


def merge_tokens(features: Tensor, count: int) -> Tensor:
    """(C, N, D) -> (C, count, D)."""
    tokens, sizes = features.float(), torch.ones_like(features[..., :1], dtype=torch.float32)
    step = -(-(tokens.shape[1] - count) // STEPS)
    while tokens.shape[1] > count:
        tokens, sizes = merge_pairs(tokens, sizes, min(step, tokens.shape[1] - count, tokens.shape[1] // 2))
    return tokens.to(features.dtype)


def merge_pairs(tokens: Tensor, sizes: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """One step of bipartite soft matching.

    Args:
        tokens: (C, N, D) fp32.
        sizes: (C, N, 1), how many tokens each stands for.
        pairs: tokens of the first set (the even ones) to merge into the second, at most half of N.

    Returns:
        (C, N - pairs, D) tokens and (C, N - pairs, 1) sizes, in sequence.
    """
    alike = F.normalize(tokens, dim=-1)
    similarity, match = (alike[:, ::2] @ alike[:, 1::2].transpose(1, 2)).max(-1)
    merged = similarity.sort(dim=-1, descending=True, stable=True).indices[:, :pairs]
    target = match.gather(1, merged) * 2 + 1
    merged = merged * 2
    weighted = torch.cat([tokens * sizes, sizes], -1)
    moved = weighted.gather(1, merged[..., None].expand(-1, -1, weighted.shape[-1]))
    weighted = weighted.scatter_add(1, target[..., None].expand_as(moved), moved)
    left = torch.ones(sizes.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, merged, False)
    weighted = weighted[left].unflatten(0, (len(tokens), -1))
    return weighted[..., :-1] / weighted[..., -1:], weighted[..., -1:]
