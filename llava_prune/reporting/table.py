"""The report on a terminal: one table of origin, hard and their ratio, one of the FLOPs conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..flops import CONVENTIONS

TIME_ROWS = {
    "first_token": "time to first token",
    "vision_tower": "  of which vision tower",
    "prefill": "  of which prefill, pruners included",
    "pruners": "    of which pruners",
    "decode_token": "decode, per token",
}
NOTES = (
    "origin: the stock model, pruners taken off",
    "prefill: the decoder's layers, with the pruners and the removal of tokens between them; without",
    "  vision tower, projector, token merger and language model head",
    "KV cache, measured: with the padding of its batch",
)


def token_runs(*per_mode: list[float]) -> list[tuple[int, int, list[float]]]:
    """Neighbouring layers with the same counts in every mode, as (first, last, count in each mode)."""
    runs: list[tuple[int, int, list[float]]] = []
    for layer, counts in enumerate(zip(*per_mode, strict=True)):
        if runs and runs[-1][2] == list(counts):
            runs[-1] = (runs[-1][0], layer, list(counts))
        else:
            runs.append((layer, layer, list(counts)))
    return runs


def scaled(values: list[float], base: int) -> tuple[str, Callable[[float], str]]:
    """A prefix that suits the largest of the values (base 1000: FLOPs, 1024: bytes), and the number before it."""
    prefixes = ("", "K", "M", "G", "T", "P")
    power = 0
    while max(values) >= base ** (power + 1) and power < len(prefixes) - 1:
        power += 1
    prefix = prefixes[power] + ("i" if power and base == 1024 else "")
    return prefix, lambda value: f"{value / base**power:.4g}"


def print_report(result: dict[str, Any]) -> None:
    """Both tables and what they are of."""
    from rich.console import Console

    console = Console(width=100, highlight=False)
    for line in _heading(result):
        console.print(line)
    console.print(_main_table(result))
    console.print(_conventions_table(result))
    memory = result["timing"]["memory"] or "can not be set back, so not measured, on this system"
    for line in (*NOTES, f"peak memory: {memory}, weights included"):
        console.print(line, style="dim")


def _heading(result: dict[str, Any]) -> list[str]:
    model, samples, timing = result["model"], result["samples"], result["timing"]
    origin = result["modes"]["origin"]
    threads = "" if model["device"] != "cpu" else f" (threads: {model['cpu_threads']})"
    return [
        f"[bold]{model['name']}[/bold], {model['weights']} weights, {model['stack']} stack (transformers "
        f"{model['transformers']}, torch {model['torch']}), {model['dtype']}, {model['attention']}, "
        f"{model['device']}{threads}",
        _method(result["pruning"]),
        f"{samples['number']} samples ({samples['source']}), batch size {samples['batch_size']}: "
        f"{origin['vision_tokens']:.1f} vision and {origin['text_tokens']:.1f} text tokens each",
        f"times: {timing['clock']}, median (90th percentile) of {timing['calls']} calls of {timing['new_tokens']} "
        f"tokens, {timing['warmup']} a batch thrown away",
    ]


def _method(pruning: dict[str, Any]) -> str:
    """What is measured, where it prunes and how much."""
    config = pruning["config"]
    if config is None:
        return f"{pruning['baseline']}, before the decoder, at most {pruning['average_tokens']:g} tokens"
    target = f"{config['target_token_num']:g} tokens" if config["target_token_num"] else ""
    target = target or f"sparsity {config['target_sparsity']:g}"
    budget = f"exactly {target}" if config["selection"] == "topk" else f"threshold {config['threshold']:g}"
    if pruning["baseline"]:
        budget = f"at most {target}"
    of = pruning["baseline"] or pruning["pruners"] or "untrained pruners"
    return f"{of}, layers {', '.join(map(str, config['pruning_layers']))}, {budget}"


def _modes(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    origin, pruned = result["modes"].values()
    return origin, pruned


def _ratio(pruned: float, origin: float) -> str:
    return f"{pruned / origin:.3f}" if origin else ""


def _main_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    origin, pruned = _modes(result)
    table = Table(title="tokens, FLOPs and bytes are of the prefill, means over the samples")
    table.add_column("")
    for name in (*result["modes"], "ratio"):
        table.add_column(name, justify="right")

    def row(label: str, first: float, second: float, shown: Callable[[float], str]) -> None:
        table.add_row(label, shown(first), shown(second), _ratio(second, first))

    for first, last, counts in token_runs(origin["tokens_per_layer"], pruned["tokens_per_layer"]):
        layers = f"layer {first}" if first == last else f"each of layers {first}-{last}"
        row(f"vision tokens entering {layers}", *counts, "{:.1f}".format)
    row("average tokens", origin["average_tokens"], pruned["average_tokens"], "{:.1f}".format)
    row("final tokens", origin["final_tokens"], pruned["final_tokens"], "{:.1f}".format)
    table.add_section()

    prefix, shown = scaled([origin["flops"]["llm"]["C"], pruned["flops"]["llm"]["C"]], 1000)
    text = f"{origin['text_tokens']:.1f} text tokens"
    labels = {"llm": f"LLM, {prefix}FLOPs (C, {text})", "pruners": "pruners", "token_merger": "token merger"}
    labels |= {"llm_and_modules": "LLM with these", "vision_tower": "vision tower", "projector": "projector"}
    for name, label in labels.items():
        values = [mode["flops"][name] for mode in (origin, pruned)]
        values = [value["C"] if name == "llm" else value for value in values]
        if any(values):
            row(label if name == "llm" else f"  {label}", *values, shown)
    table.add_section()

    prefix, shown = scaled([mode["kv_bytes"]["measured"] for mode in (origin, pruned)], 1024)
    for name in ("computed", "measured"):
        row(f"KV cache, {name}, {prefix}B", origin["kv_bytes"][name], pruned["kv_bytes"][name], shown)
    table.add_section()

    for name, label in TIME_ROWS.items():
        times = [mode["times_ms"][name] for mode in (origin, pruned)]
        cells = [f"{time['median']:.2f} ({time['p90']:.2f})" if time["median"] else "" for time in times]
        table.add_row(f"{label}, ms", *cells, _ratio(times[1]["median"], times[0]["median"]))
    peaks = [mode["peak_memory_bytes"] for mode in (origin, pruned)]
    if all(peaks):
        prefix, shown = scaled(peaks, 1024)
        row(f"peak memory, {prefix}B", *peaks, shown)
    return table


def _conventions_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    origin, pruned = _modes(result)
    text = origin["text_tokens"]
    prefix, shown = scaled([mode["flops"]["llm"]["D"] for mode in (origin, pruned)], 1000)
    title = f"LLM {prefix}FLOPs as the field counts: with the {text:.1f} text tokens, then of vision tokens alone"
    table = Table(title=title)
    for name in ("a layer with n tokens", "counted by", *result["modes"], "ratio", *result["modes"], "ratio"):
        numbers = name not in ("a layer with n tokens", "counted by")
        table.add_column(name, justify="right" if numbers else "left")
    for name, convention in CONVENTIONS.items():
        cells = []
        for part in ("llm", "llm_vision_only"):
            values = [mode["flops"][part][name] for mode in (origin, pruned)]
            cells += [shown(values[0]), shown(values[1]), _ratio(values[1], values[0])]
        table.add_row(f"{name}: {convention.formula}", convention.source, *cells)
    return table
