"""95 % intervals: of a mean over seeds, and of a share of questions."""

from __future__ import annotations

import math
from statistics import mean, stdev

# two-sided 95 % quantiles of Student's t by degrees of freedom; of more, the last is hardly too wide
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL = 1.960


def of_seeds(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's interval of values of different seeds; of one value, that value three times."""
    centre = mean(values)
    if len(values) < 2:
        return centre, centre, centre
    freedom = min(len(values) - 1, len(STUDENT))
    half = STUDENT[freedom - 1] * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def of_share(share: float, number: int) -> tuple[float, float]:
    """Wilson's interval (Wilson 1927) of a share of `number` questions."""
    squared = NORMAL**2 / number
    centre = (share + squared / 2) / (1 + squared)
    half = NORMAL / (1 + squared) * math.sqrt(share * (1 - share) / number + squared / (4 * number))
    return centre - half, centre + half
