"""The unpruned (real) pass of a training step, which the pruned (fake) one is held to, by the shortest way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adaptation import without_adapters
from .guidance import guided_pass
from .layout import padded_index
from .patch import PruneHandle, prune_mode
from .state import ForwardRecord

Features = dict[int, Tensor]


class Unpruned(NamedTuple):
    """What the unpruned pass says.

    Attributes:
        features: feature layer -> its output (B, T, hidden_size), without a gradient.
        text_index: (B, S) long, the text's places in them.
        shares: pruning layer -> what guidance says of its vision tokens; empty without guidance.
    """

    features: Features
    text_index: Tensor
    shares: dict[int, Tensor]


@dataclass(frozen=True)
class UnprunedPass:
    """Restarts from the hidden states that were recorded before the first pruner where the base is as it was there.

    Attributes:
        model: the whole model.
        handle: of its pruners.
        lora: whether an adapter is trained, so that the base as it was is the model without it.
    """

    model: nn.Module
    handle: PruneHandle
    lora: bool

    def __call__(self, record: ForwardRecord, inputs: dict[str, Any]) -> Unpruned:
        """Of the batch whose pruned pass made `record`.

        Args:
            inputs: of the model's forward, from which the pass starts where it can not restart.
        """
        handle, state = self.handle, self.handle.state
        features, shares = {}, {}
        of_this_model = not self.lora and handle.pruners.merger is None
        if state.guided:
            head, config = self.model.get_output_embeddings(), handle.config
            read = state.feature_layers if of_this_model else ()
            guided = guided_pass(handle.decoder, head, record, config.pruning_layers, read, config.compile_layers)
            features, shares = guided.features, guided.shares
        elif of_this_model:
            features = handle.unpruned_features(record)
        if state.feature_layers and not of_this_model:
            return Unpruned(*self._as_they_were(record, inputs), shares)
        return Unpruned(features, _text_index(record), shares)

    def _as_they_were(self, record: ForwardRecord, inputs: dict[str, Any]) -> tuple[Features, Tensor]:
        """Those of the base without its adapter, which else could make real and fake alike by changing the real."""
        with without_adapters(self.model):
            if self.handle.pruners.merger is not None or self.handle.config.pruning_layers[0] > 0:
                return self._from_the_start(inputs)
            return self.handle.unpruned_features(record), _text_index(record)

    @torch.no_grad()
    def _from_the_start(self, inputs: dict[str, Any]) -> tuple[Features, Tensor]:
        """By the stock pass, where there is no shared prefix to restart from."""
        state = self.handle.state
        fake_record = state.record
        with prune_mode(self.model, "origin"):
            state.stock_features = {}
            self.model(**inputs, use_cache=False)
            features, state.stock_features = state.stock_features, None
        index = _text_index(state.record)
        state.record = fake_record
        return features, index


def _text_index(record: ForwardRecord) -> Tensor:
    return padded_index(record.layout.text_after_image)[0]
