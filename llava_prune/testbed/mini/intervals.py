"""95 % intervals: of a mean over seeds, and of a share of questions."""

from __future__ import annotations

import math
from statistics import mean, stdev

# two-sided 95 % quantiles of Student's t by degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL = 1.960


def of_seeds(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's interval of values of different seeds; of one value, that value three times."""
    centre = mean(values)
    if len(values) < 2:
        return centre, centre, centre
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    half = quantile * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def of_share(share: float, number: int) -> tuple[float, float]:
    """Wilson's interval (Wilson 1927) of a share of `number` questions."""
    squared = NORMAL**2 / number
    centre = (share + squared / 2) / (1 + squared)
    half = NORMAL / (1 + squared) * math.sqrt(share * (1 - share) / number + squared / (4 * number))
    return centre - half, centre + half
