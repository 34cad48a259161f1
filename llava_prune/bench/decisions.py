"""The same decisions on two paths: where half precision rounds otherwise, tokens of almost one score change places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..patch import PruneHandle, prune_mode


@contextmanager
def keeping(handle: PruneHandle, kept: dict[int, Tensor]) -> Iterator[None]:
    """Within the block mode masked keeps what is given, whatever the scores.

    Args:
        kept: pruning layer -> (B, N) bool, as in `ForwardRecord.kept`; what was decided before the decoder is left
            to the baseline that does so.
    """
    forwards = {layer: handle.layer_forwards[layer] for layer in kept if layer in handle.scorers}
    for layer, forward in forwards.items():
        forward.select = lambda value, view, tokens=kept[layer]: tokens
    try:
        with prune_mode(handle.model, "masked"):
            yield
    finally:
        for forward in forwards.values():
            del forward.select


def share_otherwise(kept: dict[int, Tensor], others: dict[int, Tensor]) -> float:
    """Share of the tokens kept, over all pruning layers, that the others dropped."""
    changed = sum(int((rows & ~others[layer]).sum()) for layer, rows in kept.items())
    return changed / max(1, sum(int(rows.sum()) for rows in kept.values()))
