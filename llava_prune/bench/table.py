"""The bench on a terminal: times, what they are of the stock model's, and how far from what the device can do."""

from __future__ import annotations

from typing import Any

from .floors import Rates
from .inference import OURS, REMOVAL, Result, Scenario

STOCK = ("stock", "stock, in graphs", "stock, static cache")


def best_stock(results: list[Result], name: str) -> float:
    """The least time of the stock model, however it is run; `name` is a field of `Result`."""
    return min(getattr(result, name) for result in results if result.method in STOCK and result.reason is None)


def deciding_time(results: list[Result]) -> float:
    """Share of the pruners in the time to the first token: what it takes more than the same removal without them."""
    times = {result.method: result.first_ms for result in results}
    return 1 - times[REMOVAL] / times[OURS]


def print_rates(rates: Rates, console: Any) -> None:
    """The two rates that floors are made of."""
    console.print(f"measured here: {rates.flops / 1e12:.3g} TFLOP/s in matrix products, {rates.bytes / 1e12:.3g} TB/s")


def print_scenario(scenario: Scenario, results: list[Result], console: Any) -> None:
    """One scenario: a row a method."""
    from rich.table import Table

    table = Table(title=f"{scenario.name}: {scenario.images} x vision and {scenario.text} text tokens a sample")
    for name in ("", "average tokens", "TFLOPs", "deciding", "KV MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for what in ("first token", "a further token"):
        for name in (f"{what}, ms", "of stock", "of best stock", "x floor"):
            table.add_column(name, justify="right")
    for name in ("otherwise", "difference"):
        table.add_column(name, justify="right")
    stock = results[0]
    for result in results:
        if result.reason is not None:
            table.add_row(result.method, "not reached")
            continue
        cells = [f"{result.average_tokens:.1f}", f"{result.flops / 1e12:.3f}", f"{result.deciding:.2%}"]
        cells.append(f"{result.cache_bytes / 2**20:.1f}")
        for name in ("first", "token"):
            time, floor = getattr(result, f"{name}_ms"), getattr(result, f"{name}_floor_ms")
            best = best_stock(results, f"{name}_ms")
            cells += [f"{time:.2f}", f"{time / getattr(stock, f'{name}_ms'):.3f}", f"{time / best:.3f}"]
            cells.append(f"{time / floor:.2f}")
        cells.append("" if result.otherwise is None else f"{result.otherwise:.2%}")
        cells.append("" if result.difference is None else f"{result.difference:.1e}")
        table.add_row(result.method, *cells)
    console.print(table)
    console.print(f"the pruners take {deciding_time(results):.1%} of the time to the first token")
    for result in results:
        if result.reason is not None:
            console.print(f"{result.method}: {result.reason}", style="dim")


NOTES = (
    "first token: from the end of the vision tower; projector, pruners and language model head included",
    "stock: Hugging Face's or LLaVA's code as it is; in graphs: under llava_prune.accelerate",
    "x floor: over the larger of FLOPs / matrix rate and bytes / memory bandwidth, as measured above",
    "deciding: share of the FLOPs in pruners, or in what a baseline computes in the decoder",
    "removal alone: the same counts, of the first tokens: what it takes less is what the pruners take",
    "otherwise: share of the tokens kept that the same method drops outside graphs, where rounding decides",
    "difference: of the first token's logits to mode masked with the same tokens, relative to the largest",
)
