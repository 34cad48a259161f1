"""What a bound decoder layer does in each mode.

soft and masked leave every row in place and change the attention mask; hard removes rows from the hidden states, the
positions, the masks and, by never writing them, the key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import compat, compat_cache
from .attention_masks import of_cached_rows, of_rows, with_bias, without_keys
from .config import PruneConfig
from .drop import Rows
from .layout import gather_rows, marked, padded_index, placed, replace_rows
from .masks import (
    bounded_where_dropped,
    estimate_mask,
    log_bias,
    selected,
    straight_through_selection,
    topk_mask,
)
from .scoring import LayerView, Scorer
from .soft_attention import HIDDEN, biased_layer
from .state import ForwardRecord, PruneState

Budget = Callable[[int, int], "tuple[int, ...] | None"]


class LayerForward:
    """The forward of decoder layer `index`, around the stored original.

    Args:
        index: layer number from 0.
        layer: the decoder layer, not bound yet.
        scorers: what decides at each pruning layer of the model.
        budget: (vision tokens, images) of a sample -> tokens that each pruning layer keeps, None by threshold.
        num_layers, config, state, backend: of the model it belongs to.
    """

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        scorers: dict[int, Scorer],
        budget: Budget,
        num_layers: int,
        config: PruneConfig,
        state: PruneState,
        backend: str,
    ):
        self.index = index
        self.layer = layer
        self.original = layer.forward
        self.scorer = scorers.get(index)
        self.pruning_layers = sorted(scorers)
        self.budget = budget
        self.last = index == num_layers - 1
        self.config = config
        self.state = state
        self.use_backend(backend)
        self.bind = compat.bind_arguments(self.original)
        # the pruning layer whose decision holds here
        self.segment = max(layer for layer in self.pruning_layers if layer <= index)

    def use_backend(self, backend: str) -> None:
        """Make masks for this attention backend from now on."""
        self.flash, self.eager = backend == "flash_attention_2", backend == "eager"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = self.state.record
        if record is None or record.mode == "origin":
            output = self.original(*args, **kwargs)
            if self.state.stock_features is not None and self.index in self.state.feature_layers:
                self.state.stock_features[self.index] = compat.hidden_states_of(output)
            return output
        device = compat.execution_device(self.layer)
        call = compat.on_device(self.bind(args, kwargs), device)
        record.move(device)
        if self.state.prefix_only:
            if self.index == self.pruning_layers[0]:
                record.prefix = _detached(call)
            return compat.layer_output(self.layer, call["hidden_states"])
        if record.mode == "hard":
            return self._hard(call, record)
        return self._masked(call, record)

    def select(self, value: Tensor, view: LayerView) -> Tensor:
        """(B, N) bool, the alive tokens that stay; those whose logits are read come first."""
        return selected(value, view.alive, view.counts, view.predicting, *self.rule)

    @property
    def rule(self) -> tuple[float, int, int | None]:
        """Threshold, and tokens that stay at the least and at the most."""
        return self.config.threshold, self.config.min_keep, self.config.max_keep

    def _counts(self, record: ForwardRecord) -> Tensor | None:
        """(B,) vision tokens that stay, or None where a threshold decides."""
        layout = record.layout
        if record.budgets is None:
            record.budgets = [self.budget(size.vision, size.images) for size in layout.sizes]
        if record.budgets[0] is None:
            return None
        place = self.pruning_layers.index(self.index)
        return torch.tensor([budget[place] for budget in record.budgets], device=layout.valid.device)

    # ---- soft and masked: every row stays, the mask changes

    def _masked(self, call: dict[str, Any], record: ForwardRecord) -> Any:
        if self._trains(call) and not record.decoding:
            output = self._biased(call, record)
        else:
            output = self._with_mask(call, record)
        if self.last:
            compat_cache.number_cache(compat_cache.cache_of(call), record.number)
        if self.index in self.state.feature_layers:
            record.features.setdefault(self.index, compat.hidden_states_of(output))
        return output

    def _trains(self, call: dict[str, Any]) -> bool:
        """Whether the mask needs a gradient and nothing stands against an attention that has no mask."""
        stock_alone = (
            self.eager
            or call.get("output_attentions")
            or call.get("use_cache")
            or compat_cache.cache_of(call) is not None
            or getattr(self.layer.self_attn, "attention_dropout", 0.0)
        )
        return self.layer.training and torch.is_grad_enabled() and not stock_alone

    def _biased(self, call: dict[str, Any], record: ForwardRecord) -> Any:
        """The layer with the soft mask as a bias on the keys, without a mask argument."""
        hidden = call["hidden_states"]
        if self.scorer is None:
            bias = record.biases[self.segment]
        else:
            bias = self._bias(self._decide(call, record)[0], record).masked_fill(~record.layout.valid, HIDDEN)
            record.biases.setdefault(self.index, bias)
        cos, sin = compat.rotary_tables(self.layer.self_attn, call, hidden, hidden.shape[1])
        tables = (cos.expand(len(hidden), -1, -1), sin.expand(len(hidden), -1, -1))
        return compat.layer_output(
            self.layer, biased_layer(self.layer, hidden, tables, bias, compiled=self.config.compile_layers)
        )

    def _with_mask(self, call: dict[str, Any], record: ForwardRecord) -> Any:
        if record.decoding:
            call["attention_mask"] = self._masked_decode_mask(call, record)
        elif self.scorer is not None:
            call["attention_mask"] = self._decide_masks(call, record)
        else:
            call["attention_mask"] = record.attention_masks[self.segment]
        hidden = call["hidden_states"]
        if torch.is_grad_enabled() and self.layer.training and not hidden.requires_grad:
            # fused SDPA keeps what the bias gradient needs only if query, key or value need a gradient, and nothing
            # before the first pruner of a frozen base does
            call["hidden_states"] = hidden.detach().requires_grad_()
        return self.original(**call)

    def _decide(self, call: dict[str, Any], record: ForwardRecord) -> tuple[Tensor, Tensor]:
        """Score, select and record; returns the cumulative mask and what stays, (B, N)."""
        hidden, layout = call["hidden_states"], record.layout
        self._record_prefix(call, record)
        before = [layer for layer in self.pruning_layers if layer < self.index]
        past_mask = record.masks[before[-1]] if before else layout.vision_valid.float()
        past_kept = record.kept[before[-1]] if before else layout.vision_valid

        # in training too a pruner looks at what it would be shown in inference, without a gradient: the slope of a
        # noisy mask is up to a million, and would multiply from pruner to pruner
        seen = {"present": ~layout.vision | self._spread(past_kept, record), "alive": past_kept}
        view = LayerView.of_all_rows(self.layer, call, record, counts=self._counts(record), **seen)
        scores = self.scorer(view)
        keep = self.select(scores.value, view)
        if scores.logits is None:
            mask = keep.float()
        elif record.mode == "soft" and self.config.estimator == "topk_st":
            noise = self.layer.training
            mask = topk_mask(scores.logits, past_kept, view.counts, self.state.temperature, noise)
            keep = mask.detach() > 0.5
        elif record.mode == "soft":
            mask = estimate_mask(
                scores.logits,
                self.config.estimator,
                self.state.temperature,
                noise=self.layer.training,
                threshold=self.config.threshold,
            )
        else:
            mask = straight_through_selection(scores.value, keep)
        if scores.vision is not None:
            call["hidden_states"] = replace_rows(hidden, layout.vision_index, past_kept, scores.vision)
        cumulative = past_mask * mask
        record.logits.setdefault(self.index, scores.logits)
        record.masks.setdefault(self.index, cumulative)
        record.charged.setdefault(self.index, past_mask.detach() * mask)
        record.kept.setdefault(self.index, keep)
        if scores.logits is not None:
            record.probabilities.setdefault(self.index, scores.value.detach().masked_fill(~past_kept, float("nan")))
        return cumulative, keep

    def _record_prefix(self, call: dict[str, Any], record: ForwardRecord) -> None:
        """Keep what enters the first pruning layer, if the unpruned pass is to start from it."""
        restarted = self.state.feature_layers or self.state.guided
        if self.index == self.pruning_layers[0] and restarted and record.prefix is None:
            record.prefix = _detached(call)

    def _decide_masks(self, call: dict[str, Any], record: ForwardRecord) -> Tensor | None:
        cumulative, keep = self._decide(call, record)
        layout, dtype = record.layout, call["hidden_states"].dtype
        if record.mode == "soft" or self.layer.training:
            attention_mask = with_bias(call["attention_mask"], self._bias(cumulative, record), dtype)
        elif torch.equal(keep, layout.vision_valid):
            attention_mask = call["attention_mask"]  # nothing dropped: the stock call, bit for bit
        else:
            present = ~layout.vision | self._spread(keep, record)
            attention_mask = without_keys(call["attention_mask"], present, present.shape[1], dtype, self.flash)
        record.attention_masks.setdefault(self.index, attention_mask)
        return attention_mask

    def _masked_decode_mask(self, call: dict[str, Any], record: ForwardRecord) -> Tensor | None:
        if self.segment not in record.attention_masks:
            dropped = not torch.equal(record.kept[self.segment], record.layout.vision_valid)
            mask = self._mask_of_every_position(call, record) if dropped else call["attention_mask"]
            record.attention_masks[self.segment] = mask
        return record.attention_masks[self.segment]

    def _mask_of_every_position(self, call: dict[str, Any], record: ForwardRecord) -> Tensor:
        """A decode step's mask over a cache that has a place for dropped tokens too."""
        present = ~record.layout.vision | self._spread(record.kept[self.segment], record)
        new = record.full_length - record.prefill_length
        present = torch.cat([present, present.new_ones(len(present), new)], -1)
        hidden = call["hidden_states"]
        return without_keys(call["attention_mask"], present, hidden.shape[1], hidden.dtype, self.flash)

    def _bias(self, cumulative: Tensor, record: ForwardRecord) -> Tensor:
        """(B, T) fp32, what attention adds to its scores of each position for a cumulative mask (B, N)."""
        return self._spread(log_bias(bounded_where_dropped(cumulative)), record)

    @staticmethod
    def _spread(values: Tensor, record: ForwardRecord) -> Tensor:
        """(B, N) over the sample's vision tokens -> (B, T) over positions, zero (False) elsewhere."""
        layout = record.layout
        length = record.prefill_length
        target = layout.vision_index.masked_fill(~layout.vision_valid, length)
        full = values.new_zeros(len(values), length + 1)
        return full.scatter(1, target, values)[:, :length]

    # ---- hard: rows are removed

    def _hard(self, call: dict[str, Any], record: ForwardRecord) -> Any:
        if record.decoding:
            self._check_cache(call, record)
            call["attention_mask"] = self._hard_decode_mask(call, record)
            return self.original(**call)
        stock = {name: call.get(name) for name in ("attention_mask", "position_ids", "position_embeddings")}
        if self.scorer is not None:
            self._drop(call, record)
        rows = record.rows[self.segment]
        if not rows.complete(record.prefill_length):
            if self.segment not in record.attention_masks:
                mask = of_rows(stock["attention_mask"], rows, call["hidden_states"].dtype, self.flash)
                record.attention_masks[self.segment] = mask
            call["attention_mask"] = record.attention_masks[self.segment]
            self._shrink_positions(call, rows)
        output = self.original(**call)
        if self.index == 0 and not rows.complete(record.prefill_length):
            # the host counts positions by this layer's cache
            scatter = partial(rows.scatter, length=record.prefill_length)
            compat_cache.change_cache(compat_cache.cache_of(call), 0, scatter)
        wanted = self.index in self.state.feature_layers
        if (self.last or wanted) and not rows.complete(record.prefill_length):
            full = rows.scatter(compat.hidden_states_of(output), record.prefill_length)
            if self.last:
                output = compat.with_hidden_states(output, full)
        else:
            full = compat.hidden_states_of(output)
        if wanted:
            record.features.setdefault(self.index, full)
        return output

    def _drop(self, call: dict[str, Any], record: ForwardRecord) -> None:
        """Decide for the rows still present, and remove what this layer drops from `call["hidden_states"]`."""
        hidden, layout = call["hidden_states"], record.layout
        self._record_prefix(call, record)
        before = [layer for layer in self.pruning_layers if layer < self.index]
        rows = record.rows[before[-1]] if before else Rows.full(*hidden.shape[:2], hidden.device)
        past_kept = record.kept[before[-1]] if before else layout.vision_valid
        is_vision = rows.flags(layout.vision)
        vision_index, alive = padded_index(is_vision, width=None if before else layout.vision_index.shape[1])
        question_index, question_valid = layout.question_index, layout.question_valid
        if not rows.complete(record.prefill_length):
            width = question_index.shape[1]
            question_index, question_valid = padded_index(rows.flags(layout.question), width=width)

        inputs = {**call}
        if not rows.complete(record.prefill_length):
            self._shrink_positions(inputs, rows)
        indices = (vision_index, alive, question_index, question_valid)
        view = LayerView(self.layer, inputs, record, rows, rows.valid, *indices, self._counts(record))
        scores = self.scorer(view)
        keep = self.select(scores.value, view)
        if scores.vision is not None:
            hidden = replace_rows(hidden, vision_index, alive, scores.vision)
        left = rows.select(~is_vision | marked(vision_index, keep, is_vision.shape[1]))
        alive_index, _ = padded_index(past_kept, width=alive.shape[1])
        record.kept[self.index] = marked(alive_index, keep, past_kept.shape[1])
        if scores.logits is not None:
            record.probabilities[self.index] = placed(alive_index, scores.value, alive, past_kept.shape[1])
        if left is None:
            record.rows[self.index] = rows
            call["hidden_states"] = hidden
            return
        record.rows[self.index], index = left
        call["hidden_states"] = gather_rows(hidden, index)

    @staticmethod
    def _shrink_positions(call: dict[str, Any], rows: Rows) -> None:
        """Kept tokens keep the rotary positions they had."""
        if call.get("position_ids") is not None:
            call["position_ids"] = rows.take(call["position_ids"], 1)
        if call.get("position_embeddings") is not None:
            cos, sin = call["position_embeddings"]
            call["position_embeddings"] = (rows.take(cos, 1), rows.take(sin, 1))
            # with tables given, 5.x reads the numbers only to tell packed sequences apart, and gaps look like those
            call["position_ids"] = None

    def _hard_decode_mask(self, call: dict[str, Any], record: ForwardRecord) -> Tensor | None:
        rows = record.rows[self.segment]
        if rows.complete(record.prefill_length):
            return call["attention_mask"]
        if self.index == 0:
            return self._mask_of_every_position(call, record)
        if self.segment not in record.attention_masks:
            hidden = call["hidden_states"]
            record.attention_masks[self.segment] = of_cached_rows(
                call["attention_mask"],
                rows,
                record.prefill_length,
                record.full_length,
                hidden.shape[1],
                hidden.dtype,
                self.flash,
            )
        return record.attention_masks[self.segment]

    def _check_cache(self, call: dict[str, Any], record: ForwardRecord) -> None:
        held = compat_cache.cache_length(compat_cache.cache_of(call), self.index)
        new = record.full_length - record.prefill_length - call["hidden_states"].shape[1]
        expected = (record.rows[self.segment].positions.shape[1] if self.index else record.prefill_length) + new
        if held != expected:
            raise ValueError(
                f"the key-value cache of decoder layer {self.index} holds {held} positions, but the latest pruned "
                f"prefill left {expected}: this cache is of another prompt or mode, prefill the whole prompt again"
            )


def _detached(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()}
