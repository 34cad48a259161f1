"""Guidance: where the unpruned model looks, as a target of the keep logits.

The task's gradient comes through the tokens that one draw kept, a noisy word about a few of them; the attention of the
unpruned pass, which is run for the discriminator anyway, says something of every token at once. It is a first guess
that task and adversary then correct: attention is what a layer reads, not what the answer needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layout import padded_index
from .scoring import LayerView
from .state import ForwardRecord


class AttentionGuide:
    """Collects, layer by layer of an unpruned pass, the attention that question and answer pay the vision tokens.

    Args:
        layers: decoder layers of the model.
        record: of the pruned pass of the same batch.
    """

    def __init__(self, layers: Sequence[nn.Module], record: ForwardRecord):
        self.layers, self.record = layers, record
        self.rows = padded_index(record.layout.text_after_image)
        self.paid: dict[int, Tensor] = {}

    @torch.no_grad()
    def watch(self, index: int, call: dict[str, Any]) -> None:
        """Note what layer `index` looks at; `call` are its arguments, hidden states (B, T, D) of all positions."""
        view = LayerView.of_all_rows(self.layers[index], call, self.record)
        self.paid[index] = view.attention(*self.rows) * self.record.layout.vision_valid

    def target(self, layer: int) -> Tensor:
        """(B, N) fp32 share of each vision token in the attention of this layer and all later ones, 0 without any."""
        paid = torch.stack([paid for index, paid in self.paid.items() if index >= layer]).sum(0)
        return paid / paid.sum(-1, keepdim=True).clamp(min=1e-9)
