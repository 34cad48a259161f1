"""What the latest forward kept, and what it cost: tokens per layer, average tokens, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor, nn

from . import compat
from .flops import DecoderShape, decoder_flops, merger_flops, pruner_flops
from .patch import PruneHandle, require_handle
from .state import ForwardRecord


@dataclass(frozen=True)
class Report:
    """Tokens of the latest forward (of the prefill, after `generate`).

    Attributes:
        tokens_per_layer: (B, num_layers) long, vision tokens that enter each decoder layer.
        average_tokens: (B,) fp32, their mean over the decoder layers: the field's "192 tokens".
        kept: pruning layer -> one tensor a sample, indices of the kept tokens among the sample's vision tokens.
        text_tokens: (B,) long, text tokens of the prefill.
        question_tokens: (B,) long, those of them that the pruners read.
        vision_tokens: (B,) long, vision tokens before any pruning.
        probabilities: pruning layer -> one fp32 tensor a sample, keep probability of each of its vision tokens, NaN
            where an earlier layer had dropped it; empty in mode origin, as `kept` is.
    """

    tokens_per_layer: Tensor
    average_tokens: Tensor
    kept: dict[int, list[Tensor]]
    text_tokens: Tensor
    question_tokens: Tensor
    vision_tokens: Tensor
    probabilities: dict[int, list[Tensor]]

    def cpu(self) -> Report:
        """The same on the CPU."""

        def moved(value: Tensor | dict[int, list[Tensor]]) -> Tensor | dict[int, list[Tensor]]:
            if isinstance(value, Tensor):
                return value.cpu()
            return {layer: [row.cpu() for row in rows] for layer, rows in value.items()}

        return Report(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})

    def of_samples(self, samples: int) -> Report:
        """A row for each sample, of which beam search and sampling may hold copies side by side."""
        copies = max(1, len(self.average_tokens) // samples)

        def first(value: Tensor | dict[int, list[Tensor]]) -> Tensor | dict[int, list[Tensor]]:
            return {k: rows[::copies] for k, rows in value.items()} if isinstance(value, dict) else value[::copies]

        return Report(**{field.name: first(getattr(self, field.name)) for field in fields(self)})


def last_report(model: nn.Module) -> Report:
    """What the latest forward of `model` kept.

    Raises:
        ValueError: no pruners attached, or no forward with an image has run since.
    """
    handle = require_handle(model)
    record = handle.state.record
    if record is None:
        raise ValueError("no forward with an image has run since the pruners were attached, or the last had no image")
    tokens = record.tokens_per_layer(handle.num_layers)
    counts = record.layout.vision_counts.tolist()
    return Report(
        tokens_per_layer=tokens,
        average_tokens=tokens.float().mean(-1),
        kept={layer: [row.nonzero().flatten() for row in kept] for layer, kept in record.kept.items()},
        text_tokens=record.layout.text.sum(-1),
        question_tokens=record.layout.question_valid.sum(-1),
        vision_tokens=record.vision_tokens,
        probabilities={
            layer: [row[:count] for row, count in zip(rows, counts, strict=True)]
            for layer, rows in record.probabilities.items()
        },
    )


def computed_tokens(record: ForwardRecord, report: Report) -> Tensor:
    """(B, num_layers) long, vision tokens that each decoder layer computed: mode masked removes none of them."""
    if record.mode in ("origin", "hard"):
        return report.tokens_per_layer
    return record.layout.vision_counts[:, None].expand_as(report.tokens_per_layer)


def llm_flops(handle: PruneHandle, report: Report, pruned: bool) -> Tensor:
    """FLOPs of the decoder layers in one prefill, 2 per multiply-add, and of the plug-in's modules if `pruned`.

    Returns:
        (B,) fp64, without the padding and filler of a batch.
    """
    shape = DecoderShape.of(handle.decoder.config)
    total = decoder_flops(shape, report.tokens_per_layer + report.text_tokens[:, None])
    return total + sum(module_flops(handle, report).values()) if pruned else total


def module_flops(handle: PruneHandle, report: Report) -> dict[str, Tensor]:
    """FLOPs of the plug-in's own modules in one prefill, 2 per multiply-add.

    Returns:
        `pruners` (or what a baseline computes in the decoder to decide) and, if there is one, `token_merger`, (B,)
        fp64.
    """
    shape = DecoderShape.of(handle.decoder.config)
    if not handle.pruners.layers:  # a baseline
        return {"pruners": handle.method.flops(shape, report)}
    flops = {
        "pruners": pruner_flops(
            handle.config,
            shape,
            report.vision_tokens,
            report.tokens_per_layer,
            report.text_tokens,
            report.question_tokens,
        )
    }
    merger = handle.pruners.merger
    if merger is not None:
        crops = report.vision_tokens // handle.config.merger_tokens
        widths = (compat.merged_width(handle.model), merger.modulation.in_features)
        flops["token_merger"] = merger_flops(handle.config, *widths, compat.tower_tokens(handle.model), crops)
    return flops
