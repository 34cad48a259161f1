"""What decides at a pruning layer: a scorer looks at the layer's inputs and scores the vision tokens still there.

The same scorer runs in every mode. It is shown all rows with the dropped ones marked (soft, masked) or only the rows
that are left (hard), and must give a token the same score either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention_rows import attention_of_rows
from .decoder_layer import PLAIN, Parts
from .drop import Rows
from .layout import TokenLayout, gather_rows, places_of
from .masks import keep_probability
from .pruner import PrunerInputs
from .soft_attention import HIDDEN
from .state import ForwardRecord


@dataclass(frozen=True)
class LayerView:
    """Inputs of a decoder layer in a prefill: S rows, N of them vision tokens, Q of them question.

    Attributes:
        layer: the decoder layer.
        call: its arguments, `hidden_states` (B, S, D) among them.
        record: of the running forward.
        rows: which positions the S rows are.
        present: (B, S) bool, rows that may be attended, or None for all.
        vision_index, alive: (B, N) rows of the vision tokens in order; False where dropped, and at filler.
        question_index, question_valid: (B, Q) rows of the question.
        counts: (B,) long, vision tokens to keep, or None where a threshold decides.
    """

    layer: nn.Module
    call: dict[str, Any]
    record: ForwardRecord
    rows: Rows
    present: Tensor | None
    vision_index: Tensor
    alive: Tensor
    question_index: Tensor
    question_valid: Tensor
    counts: Tensor | None = None

    @property
    def layout(self) -> TokenLayout:
        """Token kinds of the whole batch, before any removal."""
        return self.record.layout

    @property
    def vision(self) -> Tensor:
        """(B, N, D) hidden states of the vision tokens."""
        return gather_rows(self.call["hidden_states"], self.vision_index)

    @property
    def question(self) -> Tensor:
        """(B, Q, D) hidden states of the question."""
        return gather_rows(self.call["hidden_states"], self.question_index)

    @property
    def predicting(self) -> Tensor | None:
        """(B, N) bool, alive vision tokens that a text token is predicted from, or None if there are none."""
        if self.layout.predicting is None:
            return None
        return self.rows.flags(self.layout.predicting).gather(1, self.vision_index) & self.alive

    @property
    def last_token(self) -> tuple[Tensor, Tensor]:
        """(B, 1) row of the question's last token (without a question of the last token), and whether there is one."""
        seen = self.rows.flags(self.layout.valid)
        seen = seen if self.present is None else seen & self.present
        asked = self.rows.flags(self.layout.question)
        flags = torch.where(asked.any(-1, keepdim=True), asked, seen)
        places = torch.arange(flags.shape[1], device=flags.device)
        return (flags * places).amax(-1, keepdim=True), flags.any(-1, keepdim=True)

    def attention(self, index: Tensor, valid: Tensor) -> Tensor:
        """(B, N) fp32 attention that the rows `index` (B, Q) pay each vision token, mean over heads and rows."""
        paid = attention_of_rows(self.layer, self.call, self.layout, self.rows, self.present, index, valid)
        return paid.gather(1, self.vision_index)

    @classmethod
    def of_all_rows(cls, layer: nn.Module, call: dict[str, Any], record: ForwardRecord, **changes: Any) -> LayerView:
        """Of a layer that is given every row; `changes` say what may not be attended."""
        layout = record.layout
        hidden = call["hidden_states"]
        fields = {
            "rows": Rows.full(*hidden.shape[:2], hidden.device),
            "present": None,
            "alive": layout.vision_valid,
        }
        indices = (layout.vision_index, layout.question_index, layout.question_valid)
        names = ("vision_index", "question_index", "question_valid")
        return cls(layer, call, record, **{**fields, **dict(zip(names, indices, strict=True)), **changes})


@dataclass(frozen=True)
class Scores:
    """What a scorer says of the N vision tokens of a `LayerView`.

    Attributes:
        value: (B, N) fp32, higher is kept first; a keep probability where a threshold decides.
        logits: (B, N, 2) drop and keep, of a trained pruner.
        vision: (B, N, D) new hidden states of the vision tokens, from a method that merges, or None.
    """

    value: Tensor
    logits: Tensor | None = None
    vision: Tensor | None = None


Scorer = Callable[[LayerView], Scores]


class PrunerScorer:
    """A trained `LayerPruner` as a scorer."""

    def __init__(self, pruner: nn.Module):
        self.pruner = pruner

    def __call__(self, view: LayerView, parts: Parts = PLAIN) -> Scores:
        return Scores(*parts.step(scored)(self.pruner, *self.inputs(view, parts)))

    def inputs(self, view: LayerView, parts: Parts = PLAIN) -> PrunerInputs:
        """What the pruner reads of a view."""
        layout, residual = view.layout, None
        if self.pruner.use_attn_residual:
            attention = view.attention(view.question_index, view.question_valid)
            residual = _relative(attention, view.alive, layout.vision_counts)
        indices = (view.vision_index, view.alive, view.question_index, view.rows.positions)
        kinds = (layout.vision, layout.vision_valid, layout.num_images)
        vision, places, visible, question = parts.step(shown)(view.call["hidden_states"], *indices, *kinds)
        return PrunerInputs(vision, places, visible, question, view.question_valid, residual)


def scored(pruner: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keep probability (B, N) and logits (B, N, 2)."""
    logits = pruner(*inputs)
    return keep_probability(logits), logits


def shown(
    hidden: Tensor,
    vision_index: Tensor,
    alive: Tensor,
    question_index: Tensor,
    positions: Tensor,
    vision: Tensor,
    vision_valid: Tensor,
    num_images: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vision`, `places`, `visible` and `question` of `PrunerInputs`."""
    places = places_of(vision, vision_valid.sum(-1), num_images, positions.gather(1, vision_index))
    visible = torch.zeros_like(vision_index, dtype=torch.float32).masked_fill(~alive, HIDDEN)
    return gather_rows(hidden, vision_index), places, visible, gather_rows(hidden, question_index)


def _relative(attention: Tensor, alive: Tensor, counts: Tensor) -> Tensor:
    """Log of question-to-vision attention relative to uniform, in [-3, 3].

    Args:
        attention: (B, N) attention that the question pays each vision token.
        alive: (B, N) bool.
        counts: (B,) vision tokens before any pruning.
    """
    attention = attention * alive
    share = attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)
    return (share * counts[:, None]).clamp(min=1e-6).log().clamp(-3, 3)
