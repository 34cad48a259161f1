"""`PruneState` (what the model is set to do) and `ForwardRecord` (what one forward pass knows)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .drop import Rows
from .layout import TokenLayout

MODES = ("origin", "soft", "masked", "hard")
INFERENCE_MODES = ("origin", "masked", "hard")  # soft is for training


@dataclass
class ForwardRecord:
    """One prefill or training forward, and the decode steps that reuse its cache.

    Everything is written once: under gradient checkpointing a layer runs again in the backward pass, and what the
    first run wrote is what later layers and the losses hold on to.

    Attributes:
        layout: token kinds of the batch as the decoder sees it.
        mode: the mode the pass ran in.
        logits: per pruning layer (B, N, 2), over the sample's vision tokens (soft and masked; None of a baseline).
        masks: per pruning layer the cumulative mask, (B, N) fp32 (soft and masked).
        charged: per pruning layer the same values, with a gradient to that layer's own pruner alone (soft and masked).
        kept: per pruning layer (B, N) bool, tokens that layer and later ones see; under 0, of the tokens there were
            before a baseline reduced them ahead of the decoder.
        probabilities: per pruning layer (B, N) fp32 keep probability without a gradient, NaN where no token was left
            to decide about: dropped by an earlier layer, or filler.
        rows: per pruning layer the rows still present (hard).
        attention_masks: per pruning layer the mask argument its decoder layers take in the running step.
        biases: per pruning layer (B, T) fp32, what stands in for the mask argument where the mask has a gradient.
        budgets: per sample the tokens that each pruning layer keeps, or None (selection threshold).
        full_length: positions seen so far, pruned or not: the length of layer 0's cache.
        prefix: arguments of the first pruning layer, for the unpruned pass to restart from.
        features: outputs of the layers that `PruneState.feature_layers` names.
        notes: what a baseline read at an earlier layer.
        number: no other record's; written on a cache whose lengths do not tell that it is of a pruned prompt.
    """

    layout: TokenLayout
    mode: str
    full_length: int
    logits: dict[int, Tensor | None] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    charged: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    probabilities: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Rows] = field(default_factory=dict)
    attention_masks: dict[int, Tensor | None] = field(default_factory=dict)
    biases: dict[int, Tensor] = field(default_factory=dict)
    budgets: list[tuple[int, ...] | None] | None = None
    decoding: bool = False
    prefix: dict[str, Any] | None = None
    features: dict[int, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    number: int = field(default_factory=count(1).__next__)

    def __post_init__(self) -> None:
        if self.layout.kept is not None:
            self.kept[0] = self.layout.kept

    @property
    def prefill_length(self) -> int:
        """Positions of the prefill, T."""
        return self.layout.valid.shape[1]

    @property
    def vision_tokens(self) -> Tensor:
        """(B,) long, vision tokens of each sample before any pruning."""
        counts = self.layout.original_counts
        return self.layout.vision_counts if counts is None else counts

    def move(self, device: torch.device) -> None:
        """Follow the hidden states to another device, where `device_map` spreads the layers over several."""
        if self.layout.valid.device == device:
            return
        self.layout = self.layout.to(device)
        decided = (self.logits, self.masks, self.charged, self.kept, self.probabilities, self.rows)
        for table in (*decided, self.attention_masks, self.biases, self.notes):
            for key, value in table.items():
                table[key] = None if value is None else value.to(device)

    def tokens_per_layer(self, num_layers: int) -> Tensor:
        """(B, num_layers) long, vision tokens that enter each decoder layer."""
        counts = self.layout.vision_counts
        columns = []
        for layer in range(num_layers):
            if layer in self.kept:
                counts = self.kept[layer].sum(-1)
            columns.append(counts)
        return torch.stack(columns, dim=-1)


@dataclass
class PruneState:
    """Settings that every forward reads, plus the layout announced for the next one and the latest record.

    Plain attributes, no context variables: recomputation under checkpointing may run on another thread.
    """

    mode: str = "origin"
    temperature: float = 1.0
    target_ease: float = 1.0  # of exact budgets in training: 0 keeps all, 1 holds to the target
    target_token_num: float | None = None  # of this step, in place of the configured one
    keep_fractions: tuple[float, ...] | None = None  # of each pruning layer, late in training
    feature_layers: tuple[int, ...] = ()
    guided: bool = False  # the unpruned pass that follows asks what the answer depends on
    prefix_only: bool = False  # the pass ends before the first pruning layer; what leaves the decoder means nothing
    announced: TokenLayout | None = None
    prepared: TokenLayout | None = None  # the one announced last, of embeddings that may be given once more
    merger_questions: Tensor | None = None
    record: ForwardRecord | None = None
    stock_features: dict[int, Tensor] | None = None
    reduction: Any = None  # of the images just encoded, by a baseline
    loss_only: bool = False  # nobody reads the logits of the running step but the loss
    generating: Any = None  # inside `generate` of a Hugging Face model, how its inputs were shrunk

    def layout_of(self, inputs: Tensor | None) -> TokenLayout | None:
        """What the decoder's input is made of: as announced for it, or when it was prepared for an earlier call."""
        if self.announced is not None:
            return self.announced
        return self.prepared if self.prepared is not None and self.prepared.describes(inputs) else None
