"""What `generate` costs on a given batch: tokens and cache bytes of the prefill, times, peak memory.

A timed call generates a fixed number of tokens, greedily, from inputs that lie on the device. Its times:

    first_token   from the call until the decoder is called for the second token: vision tower, projector, token
                  merger, prefill, language model head, choice of the first token
    vision_tower  the vision transformer, without the projector
    prefill       the decoder's first call: its layers with the pruners between them, the selection and removal of
                  rows, the last norm; no vision tower, projector, token merger or language model head
    pruners       the pruner modules, a part of prefill
    decode_token  the rest of the call over the tokens after the first: one step of the whole batch

Origin is timed with the pruners taken off: it is the stock model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat, compat_cache
from ..patch import PruneHandle, prune_mode
from ..report import Report, computed_tokens, last_report

TIMES = ("first_token", "vision_tower", "prefill", "pruners", "decode_token")
Batch = dict[str, Any]


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed, linear between neighbours; raises ValueError for none."""
    if not values:
        raise ValueError("no values to take a percentile of")
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


class Clock:
    """Points in time: CUDA events on a GPU, so that marking one waits for nothing, else `time.perf_counter`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.name = "CUDA events" if device.type == "cuda" else "time.perf_counter"

    def now(self) -> Any:
        """A mark; between marks of a GPU lie the time it worked and the time it waited for the CPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronise(self) -> None:
        """Wait for the device; marks can be compared afterwards."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two marks."""
        return start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3


def cache_bytes(cache: Any) -> int:
    """Bytes that a key-value cache holds in memory, each storage once."""
    storages = [tensor.untyped_storage() for tensor in compat_cache.cache_tensors(cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Observation:
    """What one prefill of a batch of B samples did.

    Attributes:
        report: what was kept, on the CPU.
        rows: (B, num_layers) long, text and vision rows that each decoder layer computed, without padding.
        cache_bytes: of the batch's key-value cache, padding and filler included.
        images: images, or crops of images, that the vision tower saw.
        projector_rows: features that the projector saw.
    """

    report: Report
    rows: Tensor
    cache_bytes: int
    images: int
    projector_rows: int


def observe(handle: PruneHandle, mode: str, batch: Batch) -> Observation:
    """Generate one token in `mode` and note what the prefill did; the pruners stay on in origin too."""
    seen = {"images": 0, "rows": 0}

    def at_tower(_module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
        seen["images"] += len(args[0] if args else kwargs["pixel_values"])

    def at_projector(_module: nn.Module, args: tuple, _output: Any) -> None:
        seen["rows"] += args[0].shape[:-1].numel()

    def at_decoder(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen["cache"] = cache_bytes(output.past_key_values)

    tower, projector = compat.vision_modules(handle.model)
    hooks = [
        tower.register_forward_hook(at_tower, with_kwargs=True),
        projector.register_forward_hook(at_projector),
        handle.decoder.register_forward_hook(at_decoder),
    ]
    try:
        with prune_mode(handle.model, mode):
            _generate(handle.model, batch, 1)
            report = last_report(handle.model)
            vision = computed_tokens(handle.state.record, report).cpu()
            report = report.cpu()
    finally:
        for hook in hooks:
            hook.remove()
    rows = vision + report.text_tokens[:, None]
    return Observation(report, rows, seen["cache"], seen["images"], seen["rows"])


def _generate(model: nn.Module, batch: Batch, new_tokens: int) -> None:
    exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(**batch, **exactly, do_sample=False, num_beams=1, use_cache=True)


def time_call(handle: PruneHandle, batch: Batch, new_tokens: int, clock: Clock) -> dict[str, float]:
    """Milliseconds of each of `TIMES` in one call that generates `new_tokens`, two or more."""
    tower, _ = compat.vision_modules(handle.model)
    modules = {"tower": [tower], "decoder": [handle.decoder], "pruners": handle.pruners.layers.values()}
    with _spans(modules, clock) as spans:
        clock.synchronise()
        start = clock.now()
        _generate(handle.model, batch, new_tokens)
        end = clock.now()
        clock.synchronise()
    steps = spans["decoder"]
    if len(steps) != new_tokens:
        raise RuntimeError(f"generate called the decoder {len(steps)} times for {new_tokens} tokens")
    second = steps[1][0]
    return {
        "first_token": clock.milliseconds(start, second),
        "vision_tower": sum(clock.milliseconds(*span) for span in spans["tower"]),
        "prefill": clock.milliseconds(*steps[0]),
        "pruners": sum(clock.milliseconds(*span) for span in spans["pruners"]),
        "decode_token": clock.milliseconds(second, end) / (new_tokens - 1),
    }


@contextmanager
def _spans(modules: dict[str, Any], clock: Clock) -> Iterator[dict[str, list[list[Any]]]]:
    """Within the block, start and end of every call of the modules, under their name."""
    spans: dict[str, list[list[Any]]] = {name: [] for name in modules}
    hooks = []
    for name, group in modules.items():
        for module in group:

            def begin(_module: nn.Module, _args: tuple, calls: list = spans[name]) -> None:
                calls.append([clock.now()])

            def end(_module: nn.Module, _args: tuple, _output: Any, calls: list = spans[name]) -> None:
                calls[-1].append(clock.now())

            hooks.append(module.register_forward_pre_hook(begin, prepend=True))
            hooks.append(module.register_forward_hook(end))
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()


def peak_memory_source(device: torch.device) -> str | None:
    """What `peak_memory` reads on this machine, or None where a CPU's peak can not be set back."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "resident set of the process (VmHWM)" if Path("/proc/self/clear_refs").exists() else None


def peak_memory(handle: PruneHandle, batch: Batch, new_tokens: int, device: torch.device) -> int | None:
    """Highest memory in bytes, weights included, during one call that is not timed; None where it has no source."""
    if peak_memory_source(device) is None:
        return None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _generate(handle.model, batch, new_tokens)
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    _generate(handle.model, batch, new_tokens)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


@dataclass
class Measurement:
    """One mode's measurements.

    Attributes:
        observations: one a batch.
        times: name in `TIMES` -> milliseconds of every timed call.
        peak_bytes: highest over the batches, or None.
    """

    observations: list[Observation] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})
    peak_bytes: int | None = None


def measure(
    handle: PruneHandle, modes: list[str], batches: list[Batch], new_tokens: int, warmup: int, repeats: int
) -> dict[str, Measurement]:
    """Measure the modes side by side: they take turns, so that a change of the machine's pace meets them all.

    Args:
        batches: arguments of `generate`, on the device.
        new_tokens: tokens that each call generates, two or more.
        warmup: turns of each batch that are thrown away, on top of the calls that observe it.
        repeats: timed turns of each batch.
    """
    from tqdm import tqdm

    device = handle.decoder.norm.weight.device
    clock = Clock(device)
    results = {mode: Measurement() for mode in modes}
    with tqdm(total=len(batches) * (warmup + repeats), disable=None, leave=False) as progress:
        for batch in batches:
            for mode, result in results.items():
                result.observations.append(observe(handle, mode, batch))
                with _as_timed(handle, mode):
                    peak = peak_memory(handle, batch, new_tokens, device)
                result.peak_bytes = peak if result.peak_bytes is None else max(peak, result.peak_bytes)
            for turn in range(warmup + repeats):
                for mode, result in results.items():
                    with _as_timed(handle, mode):
                        times = time_call(handle, batch, new_tokens, clock)
                    if turn >= warmup:
                        for name, value in times.items():
                            result.times[name].append(value)
                progress.update()
    return results


def _as_timed(handle: PruneHandle, mode: str) -> AbstractContextManager:
    return handle.suspended() if mode == "origin" else prune_mode(handle.model, mode)
