"""The figures of a report: tokens, FLOPs, cache bytes, times and memory of one mode, and of one mode over another."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..flops import CONVENTIONS, DecoderShape, TowerShape, decoder_flops, kv_bytes, projector_flops, tower_flops
from ..patch import PruneHandle
from ..report import module_flops
from .measure import Measurement, Observation, percentile


def summarise(handle: PruneHandle, mode: str, measurement: Measurement) -> dict[str, Any]:
    """Plain numbers, ready for JSON; tokens, FLOPs and cache bytes are means over the samples.

    Returns:
        `vision_tokens` before pruning, `text_tokens`, `question_tokens`;
        `tokens_per_layer` (list over all decoder layers of the vision tokens that enter it), `average_tokens`,
        `final_tokens`; `samples`, the same token counts of each sample;
        `flops` of one prefill: `llm` and `llm_vision_only` by convention, with all rows and with the vision tokens
        alone, `pruners`, `token_merger`, `llm_and_modules` (convention C and the last two), `vision_tower`,
        `projector`;
        `kv_bytes`: `computed` from the rows of each layer, `measured` on the cache, with a batch's padding and filler;
        `times_ms`: `median` and `p90` for each of `measure.TIMES`;
        `peak_memory_bytes`, or None.
    """
    observations = measurement.observations
    tokens = torch.cat([each.report.tokens_per_layer for each in observations])
    text = torch.cat([each.report.text_tokens for each in observations])
    question = torch.cat([each.report.question_tokens for each in observations])
    vision = torch.cat([each.report.vision_tokens for each in observations])
    return {
        "vision_tokens": _mean(vision),
        "text_tokens": _mean(text),
        "question_tokens": _mean(question),
        "tokens_per_layer": tokens.double().mean(0).tolist(),
        "average_tokens": _mean(tokens),
        "final_tokens": _mean(tokens[:, -1]),
        "samples": {
            "vision_tokens": vision.tolist(),
            "text_tokens": text.tolist(),
            "question_tokens": question.tolist(),
            "tokens_per_layer": tokens.tolist(),
        },
        "flops": _flops(handle, mode, observations),
        "kv_bytes": _kv_bytes(handle, observations),
        "times_ms": {
            name: {"median": percentile(values, 50), "p90": percentile(values, 90)}
            for name, values in measurement.times.items()
        },
        "peak_memory_bytes": measurement.peak_bytes,
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _flops(handle: PruneHandle, mode: str, observations: list[Observation]) -> dict[str, Any]:
    shape = DecoderShape.of(handle.decoder.config)
    rows = torch.cat([each.rows for each in observations])
    text = torch.cat([each.report.text_tokens for each in observations])
    vision = rows - text[:, None]
    modules = {"pruners": 0.0, "token_merger": 0.0}
    if mode != "origin":
        # masked mode removes nothing, so its pruners see every token
        computed = [
            dataclasses.replace(each.report, tokens_per_layer=each.rows - each.report.text_tokens[:, None])
            for each in observations
        ]
        for report in computed:
            for name, flops in module_flops(handle, report).items():
                modules[name] += float(flops.sum()) / len(rows)
    images = sum(each.images for each in observations)
    features = sum(each.projector_rows for each in observations)
    llm = {name: _mean(decoder_flops(shape, rows, name)) for name in CONVENTIONS}
    tower, projector = compat.vision_modules(handle.model)
    return {
        "llm": llm,
        "llm_vision_only": {name: _mean(decoder_flops(shape, vision, name)) for name in CONVENTIONS},
        **modules,
        "llm_and_modules": llm["C"] + sum(modules.values()),
        "vision_tower": tower_flops(TowerShape.of(tower.config), images) / len(rows),
        "projector": projector_flops(linear_widths(projector), features) / len(rows),
    }


def linear_widths(module: nn.Module) -> list[tuple[int, int]]:
    """(input, output) widths of the linear layers in a module."""
    return [(each.in_features, each.out_features) for each in module.modules() if isinstance(each, nn.Linear)]


def _kv_bytes(handle: PruneHandle, observations: list[Observation]) -> dict[str, float]:
    shape = DecoderShape.of(handle.decoder.config)
    bytes_per_value = handle.decoder.norm.weight.element_size()
    rows = torch.cat([each.rows for each in observations])
    return {
        "computed": _mean(kv_bytes(shape, rows, bytes_per_value)),
        "measured": sum(each.cache_bytes for each in observations) / len(rows),
    }


def ratios(pruned: Any, origin: Any) -> Any:
    """Every number of `pruned` over that of `origin`, nested alike; None where there is nothing to divide."""
    if isinstance(origin, dict):
        return {name: ratios(pruned[name], value) for name, value in origin.items() if name != "samples"}
    if isinstance(origin, list):
        return [ratios(*pair) for pair in zip(pruned, origin, strict=True)]
    return pruned / origin if origin else None
