"""Independent matrix products at once: for few rows each of them leaves part of a GPU idle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_ROWS = 256  # above, one product alone fills the GPU


class SideBySide:
    """`decoder_layer.Parts.products` on streams of their own, which a graph records as branches.

    What a stream made is read by the caller's stream after it has waited, and its memory is used again by the same
    stream, after that has waited for the caller's: so nothing is overwritten that is still to be read.
    """

    def __init__(self) -> None:
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, linears: Sequence[nn.Module], hidden: Tensor) -> list[Tensor]:
        """The output of each for (B, S, D)."""
        if hidden.shape[:-1].numel() > MOST_ROWS:
            return [linear(hidden) for linear in linears]
        while len(self._streams) < len(linears) - 1:
            self._streams.append(torch.cuda.Stream(hidden.device))
        own = torch.cuda.current_stream(hidden.device)
        branches = [own, *self._streams[: len(linears) - 1]]
        for branch in branches[1:]:
            branch.wait_stream(own)
        products = []
        for linear, branch in zip(linears, branches, strict=True):
            with torch.cuda.stream(branch):
                products.append(linear(hidden))
        for branch in branches[1:]:
            own.wait_stream(branch)
        return products
