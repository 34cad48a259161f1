"""Questions as batches that every cell asks again: pictures are opened and prepared once, as far as memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reporting.samples import placed
from ..visualize.chat import Chat
from .questions import Question

MEMORY = 4 * 2**30  # bytes; what does not fit is prepared again for each cell


class PreparedBatches:
    """The batches of all questions, kept on the CPU in the model's precision.

    Args:
        chat: prepares them, and gives the device that they are asked on.
        questions: in order.
        batch_size: questions of a batch.
        memory: bytes to keep.
    """

    def __init__(self, chat: Chat, questions: list[Question], batch_size: int, memory: int = MEMORY):
        self.chat, self.free = chat, memory
        self.parts = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
        self.kept: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[tuple[list[Question], dict[str, Any]]]:
        """The questions of each batch, and the batch on the model's device."""
        device = self.chat.model.get_input_embeddings().weight.device
        for number, questions in enumerate(self.parts):
            if number in self.kept:
                yield questions, placed(self.kept[number], device)
                continue
            batch = self.chat.batch([question.sample() for question in questions])
            size = _bytes(batch)
            if size <= self.free:
                self.free -= size
                self.kept[number] = placed(batch, torch.device("cpu"))
            yield questions, batch


def _bytes(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list) else ()
    return batch.nbytes if isinstance(batch, Tensor) else sum(map(_bytes, values))
