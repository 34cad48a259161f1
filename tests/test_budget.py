"""Budgets are met exactly: never exceeded, and short by less than one token."""

import hypothesis
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_prune import PruneConfig
from llava_prune.budget import average_of, layer_counts
from llava_prune.masks import select_best


@st.composite
def settings(draw):
    num_layers = draw(st.integers(2, 40))
    layers = draw(st.lists(st.integers(1, num_layers - 1), min_size=1, max_size=4, unique=True).map(sorted))
    tokens = draw(st.integers(1, 3000))
    fractions = draw(st.lists(st.floats(0, 1), min_size=len(layers), max_size=len(layers)))
    fractions = tuple(sorted(fractions, reverse=True)) if draw(st.booleans()) else None
    least = draw(st.integers(1, 5))
    floor = average_of([min(least, tokens)] * len(layers), tokens, layers, num_layers)
    average = draw(st.floats(floor, tokens * 1.2))
    assume(average >= floor)
    return tokens, average, tuple(layers), num_layers, fractions, least


@hypothesis.settings(deadline=None)
@given(settings())
def test_the_budget_is_met_and_never_exceeded(case):
    tokens, average, layers, num_layers, fractions, least = case
    counts = layer_counts(*case)
    reached = average_of(counts, tokens, layers, num_layers)
    assert min(average, tokens) - 1 < reached <= average + 1e-5
    assert all(a >= b for a, b in zip((tokens, *counts), counts, strict=False)), "a layer keeps more than it is given"
    assert counts[-1] >= min(least, tokens)


@hypothesis.settings(deadline=None)
@given(settings(), st.floats(0, 1))
def test_a_larger_budget_keeps_more(case, more):
    tokens, average, layers, num_layers, _, _ = case
    larger = layer_counts(tokens, average + more * (tokens - average if tokens > average else 0), *case[2:])
    smaller = layer_counts(*case)
    assert average_of(larger, tokens, layers, num_layers) >= average_of(smaller, tokens, layers, num_layers) - 1


def test_layers_share_as_in_training():
    assert layer_counts(576, 192, (6, 12, 18), 32, (0.5, 0.25, 0.125)) == (215, 107, 54)
    counts = layer_counts(100, 40, (2, 4), 8, (0.6, 0.1))
    assert counts == (46, 7) and average_of(counts, 100, (2, 4), 8) == 40


def test_a_budget_under_the_floor_is_refused_with_the_floor():
    with pytest.raises(ValueError, match=r"under the floor of 108\.8"):
        layer_counts(576, 100, (6, 12, 18), 32)


def test_no_vision_tokens_need_no_budget():
    assert layer_counts(0, 0, (6, 12, 18), 32) == (0, 0, 0)


@hypothesis.settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.randoms(use_true_random=False))
def test_select_best_takes_the_count_of_the_alive(batch, tokens, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    probability = torch.randint(0, 4, (batch, tokens), generator=generator) / 4  # ties on purpose
    alive = torch.rand(batch, tokens, generator=generator) < 0.7
    counts = torch.tensor([random.randint(0, int(row.sum())) for row in alive])
    keep = select_best(probability, alive, counts)
    assert torch.equal(keep.sum(-1), counts) and not (keep & ~alive).any()
    for row in range(batch):
        kept, left = probability[row][keep[row]], probability[row][alive[row] & ~keep[row]]
        assert not len(kept) or not len(left) or kept.min() >= left.max()


def test_topk_and_max_keep_are_refused_together():
    with pytest.raises(ValueError, match="max_keep bounds selection 'threshold'"):
        PruneConfig(target_token_num=200, selection="topk", max_keep=10)
