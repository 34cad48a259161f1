"""`Replay`: samples of unpruned passes that guidance alone learns from more than once.

What an answer depends on does not change while pruners learn, and costs a pass through the whole model and back, many
times what the pruners themselves do (experience replay: Lin 1992, Machine Learning 8, 293-321).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pruner import PrunerInputs
from .scoring import UNSEEN

FILLER = {"visible": UNSEEN}  # of a sample with fewer tokens than another; 0 of everything else


class Lesson(NamedTuple):
    """What one pruner is shown of a batch, and what is right.

    Attributes:
        inputs: of the pruner, without a gradient.
        share: (B, N) fp32 target of the vision tokens, see `guidance.GuidedPass`.
        valid: (B, N) bool, False at filler.
    """

    inputs: PrunerInputs
    share: Tensor
    valid: Tensor


class Replay:
    """The last `capacity` samples, on the device; drawn with torch's CPU generator.

    All of its memory is taken at the first step, and more only when a sample has more tokens than any before.

    Args:
        capacity: samples remembered.
        count: samples drawn at each step.
    """

    def __init__(self, capacity: int, count: int):
        self.capacity, self.count = capacity, count
        self._seen = 0
        self._memory: dict[int, dict[str, Tensor]] = {}

    def joined(self, lessons: dict[int, Lesson]) -> dict[int, Lesson]:
        """A batch of every pruning layer, and `count` earlier samples with it; nothing earlier at the first step."""
        size, device = next(iter(lessons.values())).share.shape[0], next(iter(lessons.values())).share.device
        known = min(self._seen, self.capacity)
        drawn = torch.randint(known, (self.count,)).to(device) if known else None
        places = torch.arange(self._seen, self._seen + size, device=device)[-self.capacity :] % self.capacity
        self._seen += size
        return {layer: self._with_earlier(layer, lesson, drawn, places) for layer, lesson in lessons.items()}

    def _with_earlier(self, layer: int, lesson: Lesson, drawn: Tensor | None, places: Tensor) -> Lesson:
        joined, memory = {}, self._memory.setdefault(layer, {})
        for name, part in {**lesson.inputs._asdict(), "share": lesson.share, "valid": lesson.valid}.items():
            if part is None:
                joined[name] = None
                continue
            if name not in memory:
                memory[name] = part.new_empty(self.capacity, *part.shape[1:])
            length = max(part.shape[1], memory[name].shape[1])
            part, memory[name] = (_padded(rows, length, FILLER.get(name, 0)) for rows in (part, memory[name]))
            joined[name] = part if drawn is None else torch.cat([part, memory[name][drawn]])
            memory[name][places] = part[-self.capacity :]
        return Lesson(share=joined.pop("share"), valid=joined.pop("valid"), inputs=PrunerInputs(**joined))


def _padded(rows: Tensor, length: int, value: float) -> Tensor:
    """(B, length, ...) of (B, n, ...)."""
    missing = length - rows.shape[1]
    return F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing), value=value) if missing else rows
