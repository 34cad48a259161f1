"""The loss of one training step, from one forward record: what the trainer sums and logs."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import PruneConfig
from .losses import binarization_loss, sparsity_loss, token_count_loss
from .masks import average_token_fraction
from .state import ForwardRecord


def target_fraction(config: PruneConfig, record: ForwardRecord) -> Tensor:
    """(B,) the target's average tokens over vision tokens, per sample; `target_token_num` counts per image."""
    layout = record.layout
    counts = layout.vision_counts.float()
    if config.target_sparsity is not None:
        return torch.full_like(counts, 1 - config.target_sparsity)
    return (config.target_token_num * layout.num_images / counts.clamp(min=1)).clamp(max=1)


def budget_terms(
    config: PruneConfig, record: ForwardRecord, num_layers: int, target_ease: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sparsity, token count and binarization losses of a soft or masked pass, unweighted, and what to log.

    Args:
        target_ease: 0 allows everything, 1 holds to the target.

    Returns:
        losses by name; metrics by name (detached scalars).
    """
    layout, layers = record.layout, config.pruning_layers
    totals = layout.vision_counts
    weights = (totals > 0).float()
    masks = torch.stack([record.masks[layer] for layer in layers])  # (K, B, N)
    charged = record.charged if config.budget_credit == "own" else record.masks
    kept_counts = (torch.stack([charged[layer] for layer in layers]) * layout.vision_valid).sum(-1)
    kept = average_token_fraction(kept_counts, totals, layers, num_layers)
    target = 1 + (target_fraction(config, record) - 1) * target_ease
    losses = {
        "sparsity": sparsity_loss(kept, target, weights, config.sparsity_only_on_excess),
        "token_count": token_count_loss(kept, target, weights),
        "binarization": binarization_loss(masks, layout.vision_valid[None]),
    }
    with torch.no_grad():
        count = weights.sum().clamp(min=1)
        hard_counts = torch.stack([record.kept[layer].sum(-1) for layer in layers])
        hard = average_token_fraction(hard_counts, totals, layers, num_layers)
        metrics = {
            "prune/keep_ratio": (kept * weights).sum() / count,
            "prune/keep_ratio_binary": (hard * weights).sum() / count,
            "prune/target_ratio": (target * weights).sum() / count,
            "prune/with_image": weights.max(),  # where this is 0 the ratios are 0 too and say nothing
        }
        for layer, row in zip(layers, kept_counts, strict=True):
            metrics[f"prune/keep_ratio_l{layer}"] = (row / totals.clamp(min=1) * weights).sum() / count
    return losses, metrics
