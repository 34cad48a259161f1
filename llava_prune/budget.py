"""Exact budgets: the vision tokens each pruning layer keeps for a given average over all decoder layers.

Counts are integers, so the average never exceeds the budget and falls short of it by less than one token. Plain
numbers: nothing here depends on a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

SMALLEST_FRACTION = 1e-3  # of a layer that kept nothing in training, so that larger budgets can reach it


class UnreachableBudget(ValueError):
    """A budget under the floor of the method; the message says the floor."""


def layer_spans(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Decoder layers that see what each pruning layer keeps."""
    return tuple(end - start for start, end in zip(layers, (*layers[1:], num_layers), strict=True))


def average_of(counts: Sequence[int], tokens: int, layers: Sequence[int], num_layers: int) -> float:
    """Average tokens over all decoder layers, given the counts that the pruning layers keep of `tokens`."""
    kept = sum(span * count for span, count in zip(layer_spans(layers, num_layers), counts, strict=True))
    return (layers[0] * tokens + kept) / num_layers


@lru_cache(maxsize=1024)
def check_average(average_tokens: float, vision_tokens: int | None) -> None:
    """Raises ValueError for a budget that is no number of tokens, or of more than an image has (None: not known)."""
    if not 0 < average_tokens < float("inf"):
        raise ValueError(f"average_tokens must be a positive number, got {average_tokens:g}")
    if vision_tokens is not None and average_tokens > vision_tokens:
        raise ValueError(
            f"average_tokens {average_tokens:g} prunes nothing: an image has {vision_tokens} vision tokens here"
        )


def layer_counts(
    tokens: int,
    average: float,
    layers: tuple[int, ...],
    num_layers: int,
    fractions: tuple[float, ...] | None = None,
    min_keep: int = 1,
) -> tuple[int, ...]:
    """Tokens that each pruning layer keeps, non-increasing, for an average over all decoder layers of `average`.

    The keep fractions are multiplied by one number (and held between `min_keep` and `tokens`) until the budget is
    met, so layers share it as they did in training.

    Args:
        tokens: vision tokens of a sample before pruning.
        average: average tokens asked for; `tokens` or more keeps all.
        layers: pruning layers, ascending.
        num_layers: decoder layers.
        fractions: share of `tokens` each pruning layer kept in training, or None for equal shares.
        min_keep: tokens every pruning layer keeps at least (all, where there are fewer).

    Raises:
        UnreachableBudget: it is under the floor, which is in the message.
    """
    least = min(min_keep, tokens)
    spans = layer_spans(layers, num_layers)
    floor = average_of([least] * len(layers), tokens, layers, num_layers)
    if average < floor:
        raise UnreachableBudget(
            f"a budget of {average:g} average tokens is under the floor of {floor:g} for {tokens} vision tokens: the "
            f"{layers[0]} layers before the first pruning layer see all of them. Raise the budget, or train pruners "
            "for an earlier layer"
        )
    shares = [max(share, SMALLEST_FRACTION) for share in fractions or [1.0] * len(layers)]
    room = int(average * num_layers + 1e-6) - layers[0] * tokens  # rows that the layers after the first pruner may see

    def scaled(factor: float) -> list[int]:
        counts, previous = [], tokens
        for share in shares:
            previous = min(previous, max(least, int(share * factor * tokens)))
            counts.append(previous)
        return counts

    def cost(counts: list[int]) -> int:
        return sum(span * count for span, count in zip(spans, counts, strict=True))

    low, high = 0.0, 1 / SMALLEST_FRACTION
    if cost(scaled(high)) <= room:
        return tuple(scaled(high))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(middle)) <= room else (low, middle)
    counts = scaled(low)
    # rounding down left some room: give it out token by token, to the layer that lost most
    while True:
        left = room - cost(counts)
        open_layers = [
            k for k, span in enumerate(spans) if span <= left and counts[k] < (counts[k - 1] if k else tokens)
        ]
        if not open_layers:
            return tuple(counts)
        best = max(open_layers, key=lambda k: (shares[k] * low * tokens - counts[k], -k))
        counts[best] += 1
