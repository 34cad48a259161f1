"""Mask mathematics: estimators with a gradient, thresholds with bounds, cumulative masks as attention bias.

Everything is computed in fp32 whatever the model's dtype, and imports torch alone.
"""

from typing import Any

import torch
from torch import Tensor

# added before the log; also the weight a dropped token keeps in a straight-through pass
LOG_EPS = 1e-6
# what keeping a dropped token may change, over the steepest slope of a kept one
STEEPER = 4.0
# caps; a keep logit this far out is settled
SETTLED = 2.0


def keep_probability(logits: Tensor) -> Tensor:
    """Noise-free keep probability.

    Args:
        logits: (..., 2), drop and keep.

    Returns:
        (...) fp32 in (0, 1).
    """
    logits = logits.float()
    return torch.sigmoid(logits[..., 1] - logits[..., 0])


def _gumbel_difference(like: Tensor) -> Tensor:
    """Difference of two Gumbel variables, which is Logistic(0, 1), fp32."""
    tiny = torch.finfo(torch.float32).tiny
    uniform = torch.rand(like.shape, dtype=torch.float32, device=like.device).clamp(tiny, 1 - 1e-7)
    return torch.log(uniform) - torch.log1p(-uniform)


def _straight_through(soft: Tensor, threshold: float) -> Tensor:
    hard = (soft > threshold).to(soft.dtype)
    return hard + (soft - soft.detach())


def estimate_mask(
    logits: Tensor, estimator: str, temperature: float, noise: bool = True, threshold: float = 0.5
) -> Tensor:
    """Differentiable mask in [0, 1].

    `gumbel_soft` is the two-class Gumbel-Softmax (Jang et al. 2017, arXiv:1611.01144, eq. 2), which for two classes
    is sigmoid((keep - drop + Logistic noise) / temperature); `gumbel_st` is its straight-through form; `sigmoid_st`
    is the straight-through form without noise.

    Args:
        logits: (..., 2), drop and keep.
        estimator: one of `gumbel_soft`, `gumbel_st`, `sigmoid_st`.
        temperature: > 0.
        noise: False leaves the Gumbel noise out.
        threshold: keep probability above which a straight-through mask is 1.

    Returns:
        (...) fp32 mask.
    """
    logits = logits.float()
    margin = logits[..., 1] - logits[..., 0]
    if noise and estimator != "sigmoid_st":
        margin = margin + _gumbel_difference(margin)
    soft = torch.sigmoid(margin / temperature)
    if estimator == "gumbel_soft":
        return soft
    if estimator in ("gumbel_st", "sigmoid_st"):
        # the threshold is a probability at temperature 1; carry it through the temperature
        cut = torch.sigmoid(torch.logit(torch.tensor(threshold, dtype=torch.float64)) / temperature)
        return _straight_through(soft, float(cut))
    raise ValueError(f"unknown estimator {estimator!r}: use gumbel_soft, gumbel_st or sigmoid_st")


def topk_mask(logits: Tensor, alive: Tensor, counts: Tensor, temperature: float, noise: bool = True) -> Tensor:
    """Differentiable top-k, straight-through: exactly `counts` ones forward, a soft top-k backward.

    The soft mask is sigmoid((margin - t) / temperature) with the t at which a sample's mask adds up to its count, so
    tokens compete: what one gains the others lose. (The entropic top-k of Xie et al. 2020, arXiv:2002.06504, in one
    dimension; t is found by bisection and differentiated by the implicit function theorem.)

    Args:
        logits: (B, N, 2), drop and keep.
        alive: (B, N) bool.
        counts: (B,) long, tokens to keep; all that are alive where there are fewer.
        temperature: > 0.
        noise: add Gumbel noise first, so that which are best is drawn.

    Returns:
        (B, N) fp32 mask.
    """
    logits = logits.float()
    margin = logits[..., 1] - logits[..., 0]
    if noise:
        margin = margin + _gumbel_difference(margin)
    with torch.no_grad():
        cut = _soft_threshold(margin / temperature, alive, counts)
        soft = torch.sigmoid(margin / temperature - cut) * alive
        slope = soft * (1 - soft)
        share = slope / slope.sum(-1, keepdim=True).clamp(min=1e-9)
    # the threshold moves with the margins it balances: d t = sum of share d margin
    moved = (share * (margin - margin.detach())).sum(-1, keepdim=True) / temperature
    soft = torch.sigmoid(margin / temperature - cut - moved) * alive
    hard = select_best(margin.detach(), alive, counts).to(soft.dtype)
    return hard + (soft - soft.detach())


def _soft_threshold(values: Tensor, alive: Tensor, counts: Tensor, steps: int = 40) -> Tensor:
    """(B, 1) t at which sigmoid(values - t), over the alive, adds up to `counts`; far below where all are kept."""
    low = values.amin(-1, keepdim=True) - 20
    high = values.amax(-1, keepdim=True) + 20
    for _ in range(steps):
        middle = (low + high) / 2
        above = (torch.sigmoid(values - middle) * alive).sum(-1, keepdim=True) > counts[:, None]
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def select_tokens(
    probability: Tensor, alive: Tensor, threshold: float, min_keep: int = 1, max_keep: int | None = None
) -> Tensor:
    """Binary decision: alive tokens above the threshold, at least `min_keep`, at most `max_keep`, best first.

    Args:
        probability: (B, N) keep probability.
        alive: (B, N) bool, tokens that earlier layers kept (padding is not alive).

    Returns:
        (B, N) bool, a subset of `alive`. A row with fewer alive tokens than `min_keep` keeps them all.
    """
    rank = _rank(probability, alive)
    keep = (probability > threshold) | (rank < min_keep)
    if max_keep is not None:
        keep = keep & (rank < max_keep)
    return keep & alive


def select_best(probability: Tensor, alive: Tensor, counts: Tensor) -> Tensor:
    """Binary decision: the `counts` (B,) alive tokens of the highest probability, (B, N) bool."""
    return (_rank(probability, alive) < counts[:, None]) & alive


def selected(
    value: Tensor,
    alive: Tensor,
    counts: Tensor | None,
    needed: Tensor | None,
    threshold: float,
    min_keep: int,
    max_keep: int | None,
) -> Tensor:
    """Binary decision by either rule: (B, N) bool, the alive tokens that stay, those that are `needed` first.

    Args:
        value: (B, N), higher is kept first; a keep probability where the threshold decides.
        counts: (B,) long, tokens to keep, or None where the threshold decides.
        needed: (B, N) bool, tokens that stay whatever their value, or None.
    """
    if needed is not None:
        value = value.masked_fill(needed, torch.inf)
    if counts is None:
        keep = select_tokens(value, alive, threshold, min_keep, max_keep)
    else:
        keep = select_best(value, alive, counts)
    return keep if needed is None else keep | needed


def _rank(probability: Tensor, alive: Tensor) -> Tensor:
    """(B, N) place of each token, best first; tokens that are not alive come last."""
    score = probability.masked_fill(~alive, float("-inf"))
    # a stable sort makes ties fall to the earlier token, on every device
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def straight_through_selection(probability: Tensor, keep: Tensor) -> Tensor:
    """Binary mask of `keep` whose gradient is that of `probability`: (B, N) fp32."""
    return keep.to(probability.dtype) + (probability - probability.detach())


def log_bias(mask: Tensor) -> Tensor:
    """Attention bias log(M + eps) of a mask in [0, 1], fp32; finite value and gradient at 0 and 1.

    softmax(s + log M) weighs each key's exp(s) by M. The eps is taken off at M = 1, so a mask of ones is a bias of 0.
    """
    return torch.log(mask.float() * (1 - LOG_EPS) + LOG_EPS)


class _BoundedWhereDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask > 0)
        return mask.view_as(mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        limit = STEEPER * gradient.abs().masked_fill(~kept, 0).amax() if gradient.numel() else gradient.new_zeros(())
        return torch.where(kept, gradient, gradient.clamp(-limit, limit))


def bounded_where_dropped(mask: Tensor) -> Tensor:
    """The mask itself; the gradient of its zeros is clipped to `STEEPER` times the largest of those that are not zero.

    Attention weighs a key m exp(s) / (Z + m exp(s)). The slope at m = 1 is at most 1/4, but exp(s) / Z at m = 0: of a
    token that a head looks for hundreds of times what keeping it could change, which is at most 1, and a step would
    learn from this one token alone. Soft masks have no zeros, so theirs is untouched.
    """
    return _BoundedWhereDropped.apply(mask)


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, margin: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(margin)
        ctx.cap = cap
        return cap * torch.tanh(margin / cap)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (margin,) = ctx.saved_tensors
        ratio = margin / ctx.cap
        tanh = torch.tanh(ratio.clamp(-SETTLED, SETTLED))
        outward = (ratio.abs() > SETTLED) & (gradient * ratio < 0)  # of a step against the gradient
        # as of tanh itself, to the last bit
        slope = torch.ops.aten.tanh_backward(gradient * ctx.cap, tanh) / ctx.cap
        return slope.masked_fill(outward, 0), None


def capped(margin: Tensor, cap: float) -> Tensor:
    """cap * tanh(margin / cap), whose slope lets what is settled come back, and go no further.

    Beyond `SETTLED` caps tanh has no slope left to speak of. While everything may be kept, keep logits drift there by
    the tiniest gradient, since Adam makes steps of one size of any; and where soft masks are trained, they then stay
    there whatever is asked for (on testbed.mini, and in 50 steps of a pruner alone). There the slope is that at
    `SETTLED`, 7 %, for a step inward and 0 for one outward.
    """
    return _Capped.apply(margin, cap)


def average_token_fraction(kept_counts: Tensor, totals: Tensor, layers: tuple[int, ...], num_layers: int) -> Tensor:
    """Average tokens over all decoder layers, as a fraction of the sample's vision tokens.

    Args:
        kept_counts: (K, B) tokens (or sums of soft masks) left after each pruning layer.
        totals: (B,) vision tokens of each sample.
        layers: the K pruning layers, ascending.

    Returns:
        (B,) fp32; 1 for samples without vision tokens.
    """
    spans = torch.tensor(
        [end - start for start, end in zip(layers, (*layers[1:], num_layers), strict=True)],
        dtype=torch.float32,
        device=kept_counts.device,
    )
    fraction = kept_counts.float() / totals.clamp(min=1)
    average = (layers[0] + (spans[:, None] * fraction).sum(0)) / num_layers
    return torch.where(totals > 0, average, torch.ones_like(average))
