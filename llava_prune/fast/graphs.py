"""Functions of fixed shapes over fixed buffers, recorded once and replayed: CUDA graphs, or the same on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor | dict[str, Tensor] | None, ...]
WARMUPS = 2  # calls before a recording, in which libraries make their handles and workspaces


class CudaReplay:
    """A CUDA graph of `function`, which must read and write the same memory at every call.

    Args:
        function: takes nothing, returns a tuple of tensors (or None).
        pool: memory that graphs share; only what they return is theirs.
    """

    def __init__(self, function: Callable[[], Outputs], pool: Any):
        self.function = function  # holds on to what the graph reads
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function()

    def __call__(self) -> Outputs:
        """Run it; the tensors returned are the same every time, and valid until the next replay of any graph."""
        self.graph.replay()
        return self.outputs


class CalledReplay:
    """The same contract without a GPU: the function is called, its results are copied to the same tensors."""

    def __init__(self, function: Callable[[], Outputs]):
        self.function = function
        self.outputs: Outputs | None = None

    def __call__(self) -> Outputs:
        """As `CudaReplay`."""
        results = self.function()
        if self.outputs is None:
            self.outputs = results
        for kept, result in zip(_tensors(self.outputs), _tensors(results), strict=True):
            kept.copy_(result)
        return self.outputs


def _tensors(outputs: Outputs) -> Iterator[Tensor]:
    for value in outputs:
        if value is not None:
            yield from value.values() if isinstance(value, dict) else (value,)


class Graphs:
    """Replays by key, at most `limit` of them: one more and all are made anew as they are needed.

    Args:
        device: a CUDA device, or a CPU, on which functions are called.
    """

    def __init__(self, device: torch.device, limit: int):
        self.cuda = device.type == "cuda"
        self.limit = limit
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self._made: dict[Hashable, CudaReplay | CalledReplay] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, key: Hashable, function: Callable[[], Outputs]) -> CudaReplay | CalledReplay:
        """The replay under `key`, recorded from `function` if there is none."""
        if key not in self._made:
            if len(self._made) >= self.limit:
                self.clear()
            self._made[key] = CudaReplay(function, self._pool) if self.cuda else CalledReplay(function)
        return self._made[key]

    def clear(self) -> None:
        """Forget all: the memory they read or wrote is no longer there."""
        self._made.clear()
        if self.cuda:
            self._pool = torch.cuda.graph_pool_handle()  # the old one ended with the last graph in it
