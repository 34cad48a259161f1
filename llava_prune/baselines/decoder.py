"""What methods share that drop vision tokens inside the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import compat
from ..budget import UnreachableBudget, average_of, layer_counts
from ..flops import DecoderShape, attention_rows_flops
from ..scoring import LayerView, Scores

if TYPE_CHECKING:
    from ..report import Report
    from .handle import BaselineHandle


class DecoderBaseline:
    """Scores the vision tokens at its pruning layers; the budget says how many stay. A `Scorer`.

    Attributes:
        name: as in `attach_baseline`.
        layers: pruning layers, ascending, from 1 on.
        watched: an earlier layer whose inputs `watch` is shown, or None.
        min_keep: tokens that every pruning layer keeps at least.
    """

    name: str
    watched: int | None = None
    min_keep = 1

    def __init__(self, handle: BaselineHandle, layers: tuple[int, ...]):
        """Raises ValueError if layer 0 is among `layers`."""
        self.num_layers = handle.num_layers
        self.layers = tuple(layers)
        if self.layers and self.layers[0] < 1:
            raise ValueError(
                f"{self.name}: the first layer to drop tokens before must be at least 1, not {self.layers[0]}: what "
                "decides was attended in the layers before it"
            )

    def fractions(self, tokens: int, average: float) -> tuple[float, ...] | None:
        """Shares in which the pruning layers divide the budget, None for equal counts."""
        return None

    def floor(self, tokens: int) -> float:
        """Average tokens that the method can not go below."""
        return average_of([min(self.min_keep, tokens)] * len(self.layers), tokens, self.layers, self.num_layers)

    def counts(self, tokens: int, average: float) -> tuple[int, ...]:
        """Tokens that each pruning layer keeps of `tokens`; raises UnreachableBudget with the floor in the message."""
        floor = self.floor(tokens)
        if average < floor:
            raise UnreachableBudget(
                f"{self.name}: {average:g} average tokens are under its floor of {floor:g} for {tokens} vision "
                f"tokens, all of which the {self.layers[0]} layers before the first drop see. Raise average_tokens"
                f"{self.advice}"
            )
        fractions = self.fractions(tokens, average)
        return layer_counts(tokens, average, self.layers, self.num_layers, fractions, self.min_keep)

    advice = ""  # what else reaches a smaller budget

    def watch(self, view: LayerView) -> None:
        """Called with the inputs of layer `watched` in a prefill; leaves what it saw in `view.record.notes`."""

    def __call__(self, view: LayerView) -> Scores:
        raise NotImplementedError

    def flops(self, shape: DecoderShape, report: Report) -> Tensor:
        """(B,) fp64 FLOPs of the attention rows that the method computes on top of the decoder."""
        queries = self.raters(report)
        rows = [report.tokens_per_layer[:, layer - 1] + report.text_tokens for layer in self.layers]
        return sum(attention_rows_flops(shape, each, queries) for each in rows)

    def raters(self, report: Report) -> Tensor:
        """(B,) rows whose attention is computed at a pruning layer."""
        return torch.ones_like(report.text_tokens)

    def hooks(self, handle: BaselineHandle) -> list[Any]:
        """Registers `watch`."""
        if self.watched is None:
            return []
        layer = handle.decoder.layers[self.watched]
        bind = compat.bind_arguments(type(layer).forward)

        def show(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            record = handle.state.record
            if record is None or record.mode == "origin" or record.decoding:
                return
            device = compat.execution_device(layer)
            record.move(device)
            self.watch(LayerView.of_all_rows(layer, compat.on_device(bind(args, kwargs), device), record))

        return [layer.register_forward_pre_hook(show, with_kwargs=True)]
