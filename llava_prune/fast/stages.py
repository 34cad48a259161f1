"""The prefill in stages: the layers between two pruning layers, and the decision at the end.

A stage is a function of fixed shapes, so that it can be a graph. How many rows the next one has is known beforehand
where the budget is exact, and asked of the GPU, once a stage, where a threshold decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..decoder_layer import Parts, Tables, normed
from ..drop import Rows
from ..forward import LayerForward
from ..layout import replace_rows
from ..scoring import LayerView, PrunerScorer
from ..state import ForwardRecord
from .arena import CacheView
from .layers import prompt_layer
from .prompt import Prompt
from .steps import indexed, left_over, settled, tables_of


class StageRows(NamedTuple):
    """What a stage hands on: S rows of each of B prompts, valid ones first.

    Attributes:
        hidden: (B, S, D), after the stage's last layer (in the last stage, after the decoder's norm).
        source: (B, S) long, row of the packed prompt.
        valid: (B, S) bool.
        lengths: (B,) long, valid rows.
        keep: (B, S) bool, rows that the next stage sees; None in the last.
        kept: (B,) long, how many.
        vision_kept: (B, N) bool, which of the prompt's vision tokens are still there, in their order.
        probability: (B, N) fp32, their keep probability, NaN where none was left to decide about; None where no
            trained pruner decided.
        notes: what a baseline read at an earlier layer.
    """

    hidden: Tensor
    source: Tensor
    valid: Tensor
    lengths: Tensor
    keep: Tensor | None = None
    kept: Tensor | None = None
    vision_kept: Tensor | None = None
    probability: Tensor | None = None
    notes: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Stage:
    """The layers `start`..`end` - 1, and the decision for layer `end`, if there is one.

    Attributes:
        layers: all decoder layers.
        norm: the decoder's last norm, in the last stage, else None.
        tables: cos and sin of all positions, (P, head width).
        decision: the bound forward of layer `end`, which knows who decides; None in the last stage.
        watch: layer -> what a baseline wants to be shown of that layer's inputs.
        parts: of the layers.
    """

    start: int
    end: int
    layers: nn.ModuleList
    norm: nn.Module | None
    tables: Tables
    decision: LayerForward | None
    watch: dict[int, Callable[[LayerView], None]]
    parts: Parts

    def __call__(
        self,
        prompt: Prompt,
        before: StageRows | None,
        rows: int,
        vision: int,
        counts: Tensor | None,
        caches: list[CacheView],
    ) -> StageRows:
        """Run the stage.

        Args:
            before: what the stage before handed on, None in the first.
            rows, vision: rows and vision tokens of this stage, rounded up.
            counts: (B,) long, vision tokens to keep at the end, None where a threshold decides.
            caches: of the stage's layers.
        """
        layout = prompt.layout
        if before is None:
            hidden, valid, lengths = prompt.hidden, layout.valid, layout.valid.sum(-1)
            source = torch.arange(rows, device=hidden.device).repeat(len(hidden), 1)
        else:
            left = (before.keep, before.hidden, before.source)
            hidden, source, valid, lengths = self.parts.step(left_over)(*left, rows)
        tables = self.parts.step(tables_of)(prompt.position, source, *self.tables)
        record = ForwardRecord(layout, "hard", full_length=layout.valid.shape[1])
        record.notes.update(before.notes if before is not None else {})
        for layer, cache in zip(range(self.start, self.end), caches, strict=True):
            call = {"hidden_states": hidden, "position_embeddings": tables}
            if layer in self.watch:  # only in the first stage: baselines watch layers before they drop
                self.watch[layer](LayerView.of_all_rows(self.layers[layer], call, record))
            hidden = prompt_layer(self.layers[layer], hidden, tables, cache, self.parts)
        if self.decision is None:
            return StageRows(self.parts.step(normed)(self.norm, hidden), source, valid, lengths)
        return self._decide(hidden, source, valid, lengths, tables, record, vision, counts)

    def _decide(
        self,
        hidden: Tensor,
        source: Tensor,
        valid: Tensor,
        lengths: Tensor,
        tables: Tables,
        record: ForwardRecord,
        vision: int,
        counts: Tensor | None,
    ) -> StageRows:
        layout, step = record.layout, self.parts.step
        kinds = (layout.vision, layout.question, layout.predicting)
        widths = (vision, layout.question_index.shape[1])
        is_vision, vision_index, alive, needed, *question = step(indexed)(source, valid, *kinds, *widths)
        rows = Rows(source, valid, ragged=True)
        call = {"hidden_states": hidden, "position_embeddings": tables}
        view = LayerView(self.layers[self.end], call, record, rows, valid, vision_index, alive, *question, counts)
        scorer = self.decision.scorer
        scores = scorer(view, self.parts) if isinstance(scorer, PrunerScorer) else scorer(view)
        if scores.vision is not None:
            hidden = replace_rows(hidden, vision_index, alive, scores.vision)
        told = (scores.value, alive, counts, needed, vision_index, is_vision, source, valid)
        of_prompt = (layout.vision_index, layout.vision_valid, layout.valid.shape[1])
        *decided, probability = step(settled)(*told, *self.decision.rule, *of_prompt)
        probability = None if scores.logits is None else probability
        return StageRows(hidden, source, valid, lengths, *decided, probability, record.notes)
