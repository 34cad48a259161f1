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

from ..decoder_layer import Parts, Tables
from ..drop import Rows
from ..forward import LayerForward, marked, placed
from ..layout import gather_rows, padded_index, replace_rows
from ..scoring import LayerView, PrunerScorer
from ..state import ForwardRecord
from .arena import CacheView
from .layers import prompt_layer
from .prompt import Prompt


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
            hidden, valid = prompt.hidden, layout.valid
            source = torch.arange(rows, device=hidden.device).repeat(len(hidden), 1)
        else:
            index, valid = padded_index(before.keep, width=rows)
            hidden, source = gather_rows(before.hidden, index), before.source.gather(1, index)
        position = prompt.position.gather(1, source)
        tables = tuple(table[position] for table in self.tables)
        record = ForwardRecord(layout, "hard", full_length=layout.valid.shape[1])
        record.notes.update(before.notes if before is not None else {})
        for layer, cache in zip(range(self.start, self.end), caches, strict=True):
            call = {"hidden_states": hidden, "position_embeddings": tables}
            if layer in self.watch:  # only in the first stage: baselines watch layers before they drop
                self.watch[layer](LayerView.of_all_rows(self.layers[layer], call, record))
            hidden = prompt_layer(self.layers[layer], hidden, tables, cache, self.parts)
        lengths = valid.sum(-1)
        if self.decision is None:
            return StageRows(self.parts.norm(self.norm, hidden), source, valid, lengths)
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
        layout = record.layout
        rows = Rows(source, valid, ragged=True)
        is_vision = rows.flags(layout.vision)
        vision_index, alive = padded_index(is_vision, width=vision)
        question = padded_index(rows.flags(layout.question), width=layout.question_index.shape[1])
        call = {"hidden_states": hidden, "position_embeddings": tables}
        layer = self.layers[self.end]
        view = LayerView(layer, call, record, rows, valid, vision_index, alive, *question, counts)
        scorer = self.decision.scorer
        scores = scorer(view, self.parts) if isinstance(scorer, PrunerScorer) else scorer(view)
        chosen = self.decision.select(scores.value, view)
        if scores.vision is not None:
            hidden = replace_rows(hidden, vision_index, alive, scores.vision)
        width = source.shape[1]
        keep = valid & (~is_vision | marked(vision_index, chosen, width))
        # for the report, here and not after the stage: in a graph they cost no launches
        of_prompt = marked(source, keep, layout.valid.shape[1])
        vision_kept = of_prompt.gather(1, layout.vision_index) & layout.vision_valid
        probability = None
        if scores.logits is not None:
            of_rows = placed(vision_index, scores.value, alive, width)
            of_prompt = placed(source, of_rows, ~of_rows.isnan(), layout.valid.shape[1])
            probability = of_prompt.gather(1, layout.vision_index).masked_fill(~layout.vision_valid, float("nan"))
        return StageRows(hidden, source, valid, lengths, keep, keep.sum(-1), vision_kept, probability, record.notes)
