"""Mask mathematics: bounds, gradients, and what the words in the design mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_prune.masks import (
    average_token_fraction,
    bounded_where_dropped,
    capped,
    estimate_mask,
    keep_probability,
    log_bias,
    select_best,
    select_tokens,
    straight_through_selection,
    topk_mask,
)


def random_case(seed, rows=3, columns=12):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(rows, columns, generator=generator)
    alive = torch.rand(rows, columns, generator=generator) < 0.7
    return probability, alive


@given(seed=st.integers(0, 10_000), least=st.integers(1, 5), extra=st.integers(0, 5), cut=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_selection_keeps_its_bounds_and_the_best(seed, least, extra, cut):
    probability, alive = random_case(seed)
    keep = select_tokens(probability, alive, cut, least, least + extra)
    counts, available = keep.sum(-1), alive.sum(-1)
    assert not (keep & ~alive).any()
    assert (counts >= available.clamp(max=least)).all() and (counts <= least + extra).all()
    dropped_best = probability.masked_fill(keep | ~alive, -1).amax(-1)
    kept_worst = probability.masked_fill(~keep, 2).amin(-1)
    assert (kept_worst >= dropped_best).all()


def test_selection_without_bounds_is_the_threshold():
    probability, alive = random_case(0)
    assert torch.equal(select_tokens(probability, alive, 0.4, 1), alive & (probability > 0.4))


@pytest.mark.parametrize("estimator", ["gumbel_soft", "gumbel_st", "sigmoid_st"])
def test_every_estimator_has_a_finite_gradient_and_stays_in_range(estimator):
    logits = (torch.randn(4, 50, 2) * 20).requires_grad_()
    mask = estimate_mask(logits, estimator, temperature=0.4)
    assert mask.dtype == torch.float32 and mask.min() >= 0 and mask.max() <= 1
    if estimator != "gumbel_soft":
        assert set(mask.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    log_bias(mask).sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_half_precision_logits_give_an_fp32_mask():
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.randn(2, 1000, 2).to(dtype)
        assert torch.isfinite(estimate_mask(logits, "gumbel_soft", 0.4)).all()
        assert estimate_mask(logits, "gumbel_soft", 0.4).dtype == torch.float32


def test_gumbel_keep_frequency_is_the_keep_probability():
    logits = torch.tensor([[0.0, 1.0]]).expand(200_000, 2)
    kept = (estimate_mask(logits, "gumbel_st", temperature=0.5) > 0.5).float().mean()
    assert abs(kept - keep_probability(logits)[0]) < 5e-3


def test_straight_through_threshold_means_the_probability_at_any_temperature():
    logits = torch.stack([torch.zeros(101), torch.linspace(-5, 5, 101)], -1)
    for temperature in (0.3, 1.0, 2.0):
        mask = estimate_mask(logits, "sigmoid_st", temperature, threshold=0.8)
        assert torch.equal(mask > 0.5, keep_probability(logits) > 0.8)


def test_log_bias_scales_attention_and_is_zero_for_kept_tokens():
    scores, mask = torch.randn(3, 7), torch.rand(3, 7)
    expected = scores.exp() * mask
    assert torch.allclose((scores + log_bias(mask)).softmax(-1), expected / expected.sum(-1, keepdim=True), atol=1e-5)
    assert log_bias(torch.ones(3)).abs().max() == 0


def test_a_dropped_token_still_feels_the_loss():
    """The gradient of attention to a mask entry at 0 is finite and what it is at a tiny mask."""
    scores, values = torch.randn(6), torch.randn(6)

    def slope(entry):
        mask = torch.ones(6).index_fill(0, torch.tensor([2]), entry).requires_grad_()
        ((scores + log_bias(mask)).softmax(-1) * values).sum().backward()
        return mask.grad[2]

    assert torch.allclose(slope(0.0), slope(1e-3), rtol=1e-2) and slope(0.0).abs() > 1e-4


def test_dropped_tokens_feel_no_more_than_kept_ones():
    """A head that looks for a dropped token: unbounded its gradient is e^6 of what keeping it would change."""
    scores, values = torch.tensor([0.0, 0.5, 6.0, -1.0]), torch.tensor([1.0, -1.0, 3.0, 0.2])
    hard = torch.tensor([1.0, 1.0, 0.0, 0.0])

    def gradient(bound):
        mask = hard.clone().requires_grad_()
        seen = bounded_where_dropped(mask) if bound else mask
        assert torch.equal(seen, hard)
        ((scores + log_bias(seen)).softmax(0) @ values).backward()
        return mask.grad

    free, bounded = gradient(False), gradient(True)
    limit = 4 * free[:2].abs().max()
    assert free[2] > 20 * limit and free[3].abs() < limit
    assert torch.equal(bounded, torch.stack([free[0], free[1], limit, free[3]]))
    soft = torch.tensor([0.9, 1e-4]).requires_grad_()
    (bounded_where_dropped(soft) * torch.tensor([1.0, 50.0])).sum().backward()
    assert torch.equal(soft.grad, torch.tensor([1.0, 50.0])), "soft masks are left alone"


def test_straight_through_selection_is_binary_forward_and_soft_backward():
    probability = torch.rand(2, 5).requires_grad_()
    keep = torch.rand(2, 5) > 0.5
    mask = straight_through_selection(probability, keep)
    assert torch.equal(mask.detach().round(decimals=5), keep.float())
    mask.sum().backward()
    assert torch.equal(probability.grad, torch.ones(2, 5))


def test_average_tokens_of_the_field():
    """288, 96 and 28 tokens after layers 6, 12 and 18 of 32 layers, 576 at the start: 192.25 on average."""
    counts = torch.tensor([[288.0], [96.0], [28.0]])
    fraction = average_token_fraction(counts, torch.tensor([576]), (6, 12, 18), 32)
    assert float(fraction) * 576 == pytest.approx((6 * 576 + 6 * 288 + 6 * 96 + 14 * 28) / 32)


def topk_case(seed, batch=3, tokens=12):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, tokens, 2, generator=generator, dtype=torch.float64)
    alive = torch.rand(batch, tokens, generator=generator) < 0.8
    counts = torch.tensor([(row.sum() * 0.5).long() for row in alive])
    return logits, alive, counts


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.booleans())
def test_topk_keeps_exactly_its_count_of_the_alive(seed, noise):
    logits, alive, counts = topk_case(seed)
    mask = topk_mask(logits, alive, counts, 0.5, noise)
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and not mask[~alive].any()
    assert torch.equal(mask.sum(-1).long(), counts)
    if not noise:
        assert torch.equal(mask.bool(), select_best(keep_probability(logits), alive, counts))


def test_the_gradient_of_topk_is_that_of_the_soft_topk():
    """Against differences of the soft mask, whose threshold is found anew for every change."""
    logits, alive, counts = topk_case(1)
    margin = (logits[..., 1] - logits[..., 0]).float()

    def soft(values):
        from llava_prune.masks import _soft_threshold

        return torch.sigmoid(values / 0.5 - _soft_threshold(values / 0.5, alive, counts)) * alive

    weights = torch.randn(margin.shape, generator=torch.Generator().manual_seed(2))
    leaf = logits.float().requires_grad_()
    (topk_mask(leaf, alive, counts, 0.5, noise=False) * weights).sum().backward()
    assert (soft(margin).sum(-1) - counts).abs().max() < 1e-3
    for sample, token in [(0, 1), (1, 4), (2, 7)]:
        step = torch.zeros_like(margin)
        step[sample, token] = 0.05
        slope = ((soft(margin + step) - soft(margin - step)) * weights).sum() / 0.1
        assert leaf.grad[sample, token, 1].item() == pytest.approx(slope.item(), abs=5e-3)
        assert leaf.grad[sample, token, 0].item() == pytest.approx(-slope.item(), abs=5e-3)


def test_topk_of_all_has_no_gradient_to_lose():
    logits, alive, _ = topk_case(3)
    leaf = logits.float().requires_grad_()
    mask = topk_mask(leaf, alive, alive.sum(-1), 0.5)
    assert torch.equal(mask.bool(), alive)
    mask.sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() < 1e-3


def test_a_cap_is_tanh_and_lets_what_is_settled_come_back():
    margin = torch.linspace(-60, 60, 241, requires_grad=True)
    stock = margin.detach().clone().requires_grad_()
    settled = margin.detach().abs() > 12
    for sign in (1.0, -1.0):  # of the gradient; a step goes against it
        expected, found = 6 * torch.tanh(stock / 6), capped(margin, 6.0)
        assert torch.equal(found, expected)
        (slope,) = torch.autograd.grad(sign * found.sum(), margin)
        (plain,) = torch.autograd.grad(sign * expected.sum(), stock)
        assert torch.equal(slope[~settled], plain[~settled])
        inward = sign * margin.detach() > 0
        assert (slope[settled & inward].abs() > 0.07).all() and (slope[settled & ~inward] == 0).all()


def test_a_soft_mask_that_has_drifted_off_follows_the_target():
    torch.manual_seed(0)
    margin = torch.tensor(80.0, requires_grad=True)
    optimizer = torch.optim.Adam([margin], lr=0.5)
    for _ in range(300):
        keep = capped(margin.expand(1000), 6.0)
        kept = estimate_mask(torch.stack([-keep / 2, keep / 2], -1), "gumbel_soft", 0.5).mean()
        optimizer.zero_grad()
        (kept - 0.1).square().backward()
        optimizer.step()
    assert kept < 0.2
