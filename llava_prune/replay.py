"""`Replay`: samples of unpruned passes that guidance alone learns from more than once.

What an answer depends on does not change while pruners learn, and costs a pass through the whole model and back, many
times what the pruners themselves do (experience replay: Lin 1992, Machine Learning 8, 293-321).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pruner import PrunerInputs
from .soft_attention import HIDDEN

FILLER = {"visible": HIDDEN}  # of a sample with fewer tokens than another; 0 of everything else


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

    def without_attention(self) -> Lesson:
        """The same for a pruner without attention residual."""
        return self._replace(inputs=self.inputs._replace(attn_residual=None))


class Replay:
    """The last `capacity` samples, on the device; drawn with torch's CPU generator.

    All of its memory is taken at the first step, and more only when a sample has more tokens than any before.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._seen = 0
        self._memory: dict[int, dict[str, Tensor | None]] = {}

    def __len__(self) -> int:
        return min(self._seen, self.capacity)

    def remember(self, lessons: dict[int, Lesson]) -> None:
        """Takes a batch of every pruning layer in, the same samples in each."""
        size, device = next(iter(lessons.values())).share.shape[0], next(iter(lessons.values())).share.device
        places = torch.arange(self._seen, self._seen + size, device=device)[-self.capacity :] % self.capacity
        self._seen += size
        for layer, lesson in lessons.items():
            memory = self._memory.setdefault(layer, {})
            for name, part in _parts(lesson).items():
                if part is None:
                    memory[name] = None
                    continue
                if name not in memory:
                    memory[name] = part.new_empty(self.capacity, *part.shape[1:])
                memory[name], part = _equally_long(memory[name], part, name)
                memory[name][places] = part[-self.capacity :]

    def drawn(self, count: int, layers: Collection[int] | None = None) -> dict[int, Lesson]:
        """`count` samples of what is remembered, some perhaps more than once; a ValueError if there are none.

        Args:
            count: samples.
            layers: pruning layers wanted, or None for all.
        """
        if not len(self):
            raise ValueError("nothing is remembered yet: call remember first")
        chosen = torch.randint(len(self), (count,))

        def of(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[chosen.to(part.device)]

        return {
            layer: _lesson({name: of(part) for name, part in self._memory[layer].items()})
            for layer in (self._memory if layers is None else layers)
        }


def joined(lessons: dict[int, Lesson], others: dict[int, Lesson]) -> dict[int, Lesson]:
    """One batch of two, for every pruning layer of the first."""
    return {layer: _joined(_parts(lesson), _parts(others[layer])) for layer, lesson in lessons.items()}


def _joined(parts: dict[str, Tensor | None], others: dict[str, Tensor | None]) -> Lesson:
    return _lesson(
        {
            name: None if part is None else torch.cat(_equally_long(part, others[name], name))
            for name, part in parts.items()
        }
    )


def _parts(lesson: Lesson) -> dict[str, Tensor | None]:
    return {**lesson.inputs._asdict(), "share": lesson.share, "valid": lesson.valid}


def _lesson(parts: dict[str, Tensor | None]) -> Lesson:
    return Lesson(PrunerInputs(*(parts[name] for name in PrunerInputs._fields)), parts["share"], parts["valid"])


def _equally_long(one: Tensor, other: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(B, n, ...) and (C, m, ...), the shorter with filler."""
    length = max(one.shape[1], other.shape[1])
    return tuple(_padded(rows, length, FILLER.get(name, 0)) for rows in (one, other))


def _padded(rows: Tensor, length: int, value: float) -> Tensor:
    missing = length - rows.shape[1]
    return F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing), value=value) if missing else rows
