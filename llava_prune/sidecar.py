"""A line a sample beside LLaVA's answers file: what was kept and what it cost, without touching the answers."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .patch import handle_of, require_handle
from .report import computed_tokens, last_report, llm_flops
from .state import ForwardRecord


class Sidecar:
    """Records every `model.generate` call: bound on the instance, appended to a file as the run goes.

    Lines follow the order of the calls, and within a call that of its samples:
    `{"mode", "vision_tokens", "text_tokens", "tokens_per_layer", "average_tokens", "kept", "llm_flops", "seconds"}`;
    `kept` maps a pruning layer to indices among the sample's vision tokens, `llm_flops` counts the prefill as it ran,
    `seconds` is the call's wall time. A sample without image has `vision_tokens` 0, and so has one that goes
    on with a key-value cache. Once the pruners are detached nothing is written.

    Args:
        model: a model with pruners attached.
        path: overwritten, unless `append`.
        append: write behind what is there, of another model of the same run.
    """

    def __init__(self, model: nn.Module, path: str | Path, append: bool = False):
        self.model = model
        self.handle = require_handle(model)
        self.path = Path(path).resolve()  # the program may go to another folder
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("a" if append else "w").close()
        self._generate = model.generate
        model.generate = self._timed_generate

    def _timed_generate(self, *args: Any, **kwargs: Any) -> Any:
        if handle_of(self.handle.decoder) is not self.handle:
            return self._generate(*args, **kwargs)
        before = self.handle.state.record  # a chat goes on with it
        _synchronise()
        start = time.perf_counter()
        output = self._generate(*args, **kwargs)
        _synchronise()
        seconds = time.perf_counter() - start
        record = self.handle.state.record
        lines = self._lines(None if record is before else record, samples_of(args, kwargs, output), seconds)
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return output

    def _lines(self, record: ForwardRecord | None, samples: int, seconds: float) -> list[dict[str, Any]]:
        mode = self.handle.state.mode
        if record is None:
            return [{"mode": mode, "vision_tokens": 0, "seconds": seconds}] * samples
        report = last_report(self.model)
        computed = dataclasses.replace(report, tokens_per_layer=computed_tokens(record, report))
        report, computed = report.of_samples(samples), computed.of_samples(samples)
        flops = llm_flops(self.handle, computed, record.mode != "origin")
        return [
            {
                "mode": mode,
                "vision_tokens": int(report.vision_tokens[row]),
                "text_tokens": int(report.text_tokens[row]),
                "tokens_per_layer": report.tokens_per_layer[row].tolist(),
                "average_tokens": float(report.average_tokens[row]),
                "kept": {str(layer): kept[row].tolist() for layer, kept in report.kept.items()},
                "llm_flops": float(flops[row]),
                "seconds": seconds,
            }
            for row in range(samples)
        ]


def samples_of(args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    """Samples of a `generate` call, of each of which several sequences may be returned."""
    given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    return len(given if given is not None else output if isinstance(output, torch.Tensor) else output.sequences)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_sidecar(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a sidecar file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
