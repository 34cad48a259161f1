"""Density peak clustering of vision tokens, for a whole batch with a pool and a number of clusters a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import select_best


def merge_clusters(vision: Tensor, pool: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster tokens around density peaks, and take each cluster's mean.

    A centre is dense (near to its k nearest neighbours, k the number of clusters) and far from anything denser
    (Rodriguez and Laio, Science 2014; with nearest neighbours: Du et al. 2016).

    Args:
        vision: (B, N, D).
        pool: (B, N) bool, tokens to cluster.
        clusters: (B,) long, at most the pool's size; 0 leaves a sample as it is.

    Returns:
        (B, N) bool centres; (B, N, D) with the mean of its cluster at each centre.
    """
    hidden = vision.float()
    pairs = pool[:, :, None] & pool[:, None, :]
    distance = torch.cdist(hidden, hidden, compute_mode="donot_use_mm_for_euclid_dist") / hidden.shape[-1] ** 0.5
    far = (distance * pairs).amax((1, 2), keepdim=True)
    near = distance.masked_fill(~pairs, torch.inf).sort(-1).values.square()
    neighbours = torch.arange(near.shape[-1], device=near.device) < clusters[:, None, None]
    near = near.masked_fill(~neighbours, 0).sum(-1) / clusters.clamp(min=1)[:, None]
    density = torch.exp(-near)
    # nearest neighbours of each other are equally dense: the earlier one counts as denser
    earlier = torch.ones_like(pairs[0]).tril(-1)
    other, own = density[:, None, :], density[:, :, None]
    denser = pairs & ((other > own) | ((other == own) & earlier))
    peak = torch.where(denser, distance, far).amin(-1) * density
    centres = select_best(peak, pool, clusters)
    # every token of the pool to its nearest centre, a centre to itself
    itself = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
    apart = distance.masked_fill(itself, -1).masked_fill(~centres[:, None, :], torch.inf)
    member = F.one_hot(apart.argmin(-1), apart.shape[-1]) * pool[..., None]
    sums = torch.einsum("bnc,bnd->bcd", member.float(), hidden) / member.sum(1).clamp(min=1)[..., None]
    return centres, torch.where(centres[..., None], sums.to(vision.dtype), vision)
