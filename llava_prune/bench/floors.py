"""What no program on this device can beat: its matrix rate and its memory bandwidth, measured here and now."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..reporting.measure import Clock

WARMUP, REPEATS = 3, 10


@dataclass(frozen=True)
class Rates:
    """Of one device and dtype.

    Attributes:
        flops: of a large square matrix product, per second.
        bytes: read and written by a large copy, per second.
    """

    flops: float
    bytes: float

    def floor_ms(self, flops: float, read: float) -> float:
        """Milliseconds that so many FLOPs, and so many bytes read, take at least."""
        return max(flops / self.flops, read / self.bytes) * 1e3


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Medians of repeated runs on random data, after a warm-up; small on a CPU."""
    side, copied = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = median(time_ms(lambda: left @ right, device))
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median(time_ms(lambda: target.copy_(source), device))
    return Rates(2 * side**3 / product * 1e3, 2 * copied / copy * 1e3)


def time_ms(function: Any, device: torch.device, warmup: int = WARMUP, repeats: int = REPEATS) -> list[float]:
    """Milliseconds of each of `repeats` calls, the device synchronised around each, after `warmup` calls."""
    clock = Clock(device)
    times = []
    for number in range(warmup + repeats):
        clock.synchronise()
        start = clock.now()
        function()
        end = clock.now()
        clock.synchronise()
        if number >= warmup:
            times.append(clock.milliseconds(start, end))
    return times
