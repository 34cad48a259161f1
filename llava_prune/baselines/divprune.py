"""DivPrune: the vision tokens that are furthest from each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import FeatureBaseline, take


class DivPrune(FeatureBaseline):
    """Alvar et al., "DivPrune: Diversity-based Visual Token Pruning", CVPR 2025, arXiv:2503.02175.

    The max-min diversity problem over the projector's output, solved greedily: first the token whose nearest other is
    furthest, then always the one furthest from its nearest selected one, by cosine distance.

    The published code does the same for one image at a time, and may select a token twice where several are equal.
    """

    name = "divprune"
    after_projector = True

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        alike = F.normalize(features.float(), dim=-1)
        return take(features, most_diverse(1 - alike @ alike.transpose(1, 2), self.keep))


def most_diverse(distance: Tensor, count: int) -> Tensor:
    """Greedy max-min selection.

    Args:
        distance: (C, N, N) symmetric.
        count: how many to select.

    Returns:
        (C, count) long, in the order of selection.
    """
    itself = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
    chosen = [distance.masked_fill(itself, torch.inf).amin(-1).argmax(-1, keepdim=True)]
    nearest = torch.full_like(distance[:, 0], torch.inf)
    while len(chosen) < count:
        latest = chosen[-1][..., None].expand(-1, -1, distance.shape[-1])
        nearest = torch.minimum(nearest, distance.gather(1, latest)[:, 0]).scatter(1, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax(-1, keepdim=True))
    return torch.cat(chosen, -1)
