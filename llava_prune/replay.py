"""`Replay`: samples of unpruned passes that guidance alone learns from more than once.

What an answer depends on does not change while pruners learn, and costs a pass through the whole model and back, many
times what the pruners themselves do (experience replay: Lin 1992, Machine Learning 8, 293-321).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scoring import UNSEEN, PrunerInputs


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

    Args:
        capacity: samples remembered.
        count: samples drawn at each step.
    """

    def __init__(self, capacity: int, count: int):
        self.count = count
        self._samples: deque[dict[int, Lesson]] = deque(maxlen=capacity)

    def joined(self, lessons: dict[int, Lesson]) -> dict[int, Lesson]:
        """A batch of every pruning layer, and `count` earlier samples with it; nothing earlier at the first step."""
        new = _samples(lessons)
        chosen = []
        if self._samples:
            chosen = [self._samples[i] for i in torch.randint(len(self._samples), (self.count,)).tolist()]
        self._samples.extend(new)
        return {layer: _batch([sample[layer] for sample in new + chosen]) for layer in lessons}


def _samples(lessons: dict[int, Lesson]) -> list[dict[int, Lesson]]:
    size = len(next(iter(lessons.values())).share)

    def row(lesson: Lesson, i: int) -> Lesson:
        inputs = PrunerInputs(*(None if part is None else part[i] for part in lesson.inputs))
        return Lesson(inputs, lesson.share[i], lesson.valid[i])

    return [{layer: row(lesson, i) for layer, lesson in lessons.items()} for i in range(size)]


def _batch(rows: list[Lesson]) -> Lesson:
    """One batch of samples whose tokens may differ in number; filler is not visible."""

    def padded(parts: list[Tensor], value: float = 0) -> Tensor:
        longest = max(len(part) for part in parts)
        # what needs no filler is stacked as it is, in one kernel, where pad_sequence takes one a sample
        return torch.stack(
            [
                part
                if len(part) == longest
                else F.pad(part, (0, 0) * (part.dim() - 1) + (0, longest - len(part)), value=value)
                for part in parts
            ]
        )

    columns = PrunerInputs(*zip(*(row.inputs for row in rows), strict=True))
    inputs = PrunerInputs(
        padded(columns.vision),
        padded(columns.places),
        padded(columns.visible, UNSEEN),
        padded(columns.question),
        padded(columns.question_mask),
        None if columns.attn_residual[0] is None else padded(columns.attn_residual),
    )
    return Lesson(inputs, padded([row.share for row in rows]), padded([row.valid for row in rows]))
