"""The rows of a comparison as a table on the screen and as CSV."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .cells import ORIGIN, PRUNERS, budget_name
from .statistics import RESAMPLES, Difference
from .summary import Row

WIDTH = 170
NOTES = (
    "average tokens: vision tokens entering a decoder layer, mean over layers and questions",
    "LLM GFLOPs: of the decoder layers in a prefill, 2 per multiply-add, with what a method computes there",
    "agreement: share of the answers that are origin's",
    f"against: percentage points, 95 % interval of a paired bootstrap over the questions ({RESAMPLES:,} resamples), "
    "McNemar's exact two-sided p",
    "every p is of one comparison, uncorrected: of twenty without a true difference about one is under 0.05",
    "the best baseline of a budget is chosen by these very questions, which favours it a little",
    "ms: medians of single questions, and behind the stroke origin's in the same turns; prefill is the decoder alone, "
    "first token also the vision tower, the projector and what a method does there",
)


def flat(row: Row) -> dict[str, Any]:
    """The row with its two differences spread over columns, as in the CSV."""
    values: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if name in ("versus_origin", "versus_best"):
            parts = value or dict.fromkeys(Difference.__dataclass_fields__)
            values |= {f"{name}_{part}": number for part, number in parts.items()}
        else:
            values[name] = value
    return values


def write_csv(rows: list[Row], path: Path) -> None:
    """One line a row, full precision, empty where there is no figure."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(flat(rows[0])))
            writer.writeheader()
            writer.writerows(flat(row) for row in rows)

    write_atomically(path, write)


def columns(row: Row) -> dict[str, str]:
    """What the screen shows of a row, by heading."""
    return {
        "method": row.method,
        "average\ntokens": _number(row.average_tokens, "{:.1f}"),
        "accuracy": _number(row.accuracy, "{:.2%}"),
        "of\norigin": _number(row.of_origin, "{:.1%}"),
        "agree-\nment": _number(row.agreement, "{:.2%}"),
        "against origin": difference(row.versus_origin),
        "p": probability(row.versus_origin),
        "against best baseline": difference(row.versus_best),
        "p ": probability(row.versus_best),
        "LLM\nGFLOPs": _number(None if row.llm_flops is None else row.llm_flops / 1e9, "{:.4g}"),
        "prefill,\nms": _time(row.prefill_ms, row.prefill_origin_ms),
        "first token,\nms": _time(row.first_token_ms, row.first_token_origin_ms),
    }


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else shape.format(value)


def _time(own: float | None, origin: float | None) -> str:
    return _number(own, "{:.1f}") + _number(origin, " / {:.1f}")


def difference(value: Difference | None) -> str:
    """Percentage points and their interval."""
    if value is None:
        return ""
    return f"{100 * value.difference:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]"


def probability(value: Difference | None) -> str:
    """A p value."""
    if value is None:
        return ""
    return "<0.001" if value.p < 0.001 else f"{value.p:.3f}"


def print_table(rows: list[Row], questions: int, model: str) -> None:
    """The table, why cells are empty, and what the columns mean."""
    from rich.console import Console
    from rich.table import Table

    origin, *others = rows
    table = Table(title=f"{model}: {questions} questions, {origin.average_tokens:g} vision tokens")
    for number, name in enumerate(columns(origin)):
        table.add_column(name.strip(), justify="right" if number else "left", no_wrap=True)
    budget: Any = ORIGIN
    table.add_row(*columns(origin).values())
    for row in others:
        if row.budget != budget:
            budget = row.budget
            table.add_section()
            table.add_row(f"[bold]{budget_name(budget)}[/bold]")
        shown = columns(row)
        name = shown.pop("method")
        table.add_row(f"  {name}", *shown.values(), style="bold" if row.kind == PRUNERS else None)
    console = Console(width=max(Console().width, WIDTH), highlight=False)
    console.print(table)
    for row in rows:
        if row.reason is not None:
            console.print(f"{row.method} at {budget_name(row.budget)} is empty: {row.reason}", soft_wrap=True)
    for budget, (name, accuracy) in best_baselines(rows).items():
        console.print(f"best baseline at {budget_name(budget)}: {name} ({accuracy:.2%})")
    for note in NOTES:
        console.print(note, style="dim", soft_wrap=True)


def best_baselines(rows: list[Row]) -> dict[float, tuple[str, float]]:
    """Budget -> name and accuracy of the baseline that trained pruners were held against."""
    accuracies = {(row.method, row.budget): row.accuracy for row in rows}
    held = [(row.budget, row.best_baseline) for row in rows if row.best_baseline is not None]
    return {budget: (name, accuracies[name, budget]) for budget, name in held}
