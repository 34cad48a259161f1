"""Loss terms, each a pure function of tensors returning a scalar; the trainer alone weighs, sums and logs them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .discriminator import standardise


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def sparsity_loss(kept: Tensor, target: Tensor, weights: Tensor, only_on_excess: bool = False) -> Tensor:
    """Squared distance of the batch's mean kept fraction from its mean target.

    Args:
        kept, target: (B,) fractions in [0, 1].
        weights: (B,) 1 for samples with an image, else 0.
        only_on_excess: no loss while less than the target is kept.
    """
    difference = _weighted_mean(kept - target, weights)
    return F.relu(difference).square() if only_on_excess else difference.square()


def token_count_loss(kept: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over samples of |kept - target|: each sample is held to the target by itself. Shapes as `sparsity_loss`."""
    return _weighted_mean((kept - target).abs(), weights)


def binarization_loss(mask: Tensor, valid: Tensor) -> Tensor:
    """Mean of 4 m (1 - m) over valid tokens: 0 for a binary mask, 1 for a mask of 0.5.

    Args:
        mask: (..., N) in [0, 1].
        valid: (..., N) bool, broadcastable.
    """
    return _weighted_mean(4 * mask * (1 - mask), valid.expand_as(mask).to(mask.dtype))


def guidance_loss(logits: Tensor, target: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of a sample's tokens, by the softmax of their keep logits, to a share of each.

    Adding a constant to all keep logits changes nothing: how many tokens stay is left to the other losses.

    Args:
        logits: (B, N, 2), drop and keep.
        target: (B, N), adds up to 1 in each sample that counts.
        valid: (B, N) bool, False at filler.
        weights: (B,) 1 for samples with an image, else 0.
    """
    margin = (logits[..., 1] - logits[..., 0]).float().masked_fill(~valid, torch.finfo(torch.float32).min)
    terms = (target * F.log_softmax(margin, -1).masked_fill(~valid, 0)).sum(-1)
    return -_weighted_mean(terms, weights)


def generator_loss(fake_logits: Tensor, weights: Tensor, kind: str, real_logits: Tensor | None = None) -> Tensor:
    """Loss of the pruners for fooling the discriminator.

    `non_saturating`: -log sigmoid(D(fake)) (Goodfellow et al. 2014, arXiv:1406.2661, section 3);
    `hinge`: -D(fake) (Lim and Ye 2017, arXiv:1705.02894);
    `relativistic`: -log sigmoid(D(fake) - D(real)) of the same sample (Jolicoeur-Martineau 2018, arXiv:1807.00734).

    Args:
        fake_logits, weights: (B,).
        real_logits: (B,) without a gradient, for `relativistic`.
    """
    if kind == "relativistic":
        return _weighted_mean(F.softplus(real_logits.detach() - fake_logits), weights)
    return _weighted_mean(F.softplus(-fake_logits) if kind == "non_saturating" else -fake_logits, weights)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, weights: Tensor, kind: str) -> Tensor:
    """Loss of the discriminator, real against fake; kinds and shapes as `generator_loss`."""
    if kind == "relativistic":
        values = F.softplus(fake_logits - real_logits)
    elif kind == "non_saturating":
        values = F.softplus(-real_logits) + F.softplus(fake_logits)
    else:
        values = F.relu(1 - real_logits) + F.relu(1 + fake_logits)
    return _weighted_mean(values, weights)


def gradient_penalty(logits: Tensor, inputs: list[Tensor], weights: Tensor) -> Tensor:
    """Half the squared norm of the discriminator's gradient at its inputs, mean over samples: R1 on real inputs, R2 on
    fake ones (Mescheder et al. 2018, arXiv:1801.04406, eq. 9), with a graph of its own.

    Args:
        logits: (B,) of the discriminator.
        inputs: one (B, S, D) a layer, that require a gradient.
        weights: (B,).
    """
    gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    squared = sum(gradient.square().sum((1, 2)) for gradient in gradients)
    return 0.5 * _weighted_mean(squared, weights)


def mse_loss(fake: list[Tensor], real: list[Tensor], mask: Tensor) -> Tensor:
    """Mean squared distance of standardised hidden states, averaged over layers.

    Args:
        fake, real: one (B, S, D) a layer.
        mask: (B, S) bool, positions that count.
    """
    weights = mask.float()
    terms = [
        _weighted_mean((standardise(f) - standardise(r)).square().mean(-1), weights)
        for f, r in zip(fake, real, strict=True)
    ]
    return torch.stack(terms).mean()


def mean_var_loss(fake: list[Tensor], real: list[Tensor], mask: Tensor) -> Tensor:
    """Squared distance of each sample's mean and variance over positions; shapes as `mse_loss`."""
    weights = mask.float()[..., None]
    count = weights.sum(1).clamp(min=1)
    has_text = mask.any(1).float()

    def moments(hidden: Tensor) -> Tensor:
        hidden = standardise(hidden)
        mean = (hidden * weights).sum(1) / count
        variance = ((hidden - mean[:, None]).square() * weights).sum(1) / count
        return torch.cat([mean, variance], -1)

    terms = [
        _weighted_mean((moments(f) - moments(r)).square().mean(-1), has_text) for f, r in zip(fake, real, strict=True)
    ]
    return torch.stack(terms).mean()


def kl_loss(fake_logits: Tensor, real_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean KL(real || fake) of the next-token distributions.

    Args:
        fake_logits, real_logits: (B, S, V).
        mask: (B, S) bool, positions that count.
    """
    real = F.log_softmax(real_logits.float(), -1)
    fake = F.log_softmax(fake_logits.float(), -1)
    return _weighted_mean((real.exp() * (real - fake)).sum(-1), mask.float())
