"""Tests on the same questions answered by two methods. Only questions that one of them got right count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much more often one method is right than another, on the same questions.

    Attributes:
        difference: of the two accuracies.
        low, high: its bootstrap interval.
        p: of McNemar's exact test.
    """

    difference: float
    low: float
    high: float
    p: float


def compare(first: list[bool], second: list[bool], seed: int = 0) -> Difference:
    """`first` against `second`: whether each answered each question right, in the same order.

    Raises:
        ValueError: they are of different length, or empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers: give one of each method to every question")
    better = sum(a and not b for a, b in zip(first, second, strict=True))
    worse = sum(b and not a for a, b in zip(first, second, strict=True))
    low, high = bootstrap_interval(better, worse, len(first), seed=seed)
    return Difference((better - worse) / len(first), low, high, mcnemar(better, worse))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p value of McNemar's exact test (McNemar 1947): a coin that falls so unevenly, or more so.

    Args:
        better: questions that only the first method got right.
        worse: those that only the second got right.
    """
    flips = better + worse
    ways = total = 1  # of falling 0 times on the rarer side, in whole numbers: exact for any count
    for heads in range(min(better, worse)):
        ways = ways * (flips - heads) // (heads + 1)
        total += ways
    return min(1.0, 2 * total / 2**flips)


def bootstrap_interval(
    better: int, worse: int, questions: int, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the accuracy difference over questions drawn with replacement (Efron 1979).

    A question adds 1, -1 or 0 to the difference, so how often each is drawn is all that matters, and that is
    multinomial.

    Args:
        better, worse: as for `mcnemar`.
        questions: all of them.
    """
    shares = np.array([better, worse, questions - better - worse]) / questions
    drawn = np.random.default_rng(seed).multinomial(questions, shares, size=resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / questions
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
