"""Rows of a comparison: what each cell scored, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..testbed.score import normalised
from .cells import BASELINE, ORIGIN, PRUNERS, Cell
from .questions import Question
from .statistics import Difference, compare


@dataclass
class Row:
    """A cell's figures; all but the first four are None where the method can not reach the budget.

    Attributes:
        method, kind, budget: of the cell.
        reason: why there are no figures, or None.
        average_tokens: vision tokens entering a decoder layer, mean over layers and questions.
        llm_flops: of the decoder layers in a prefill, 2 per multiply-add, what decides there included.
        accuracy: share of right answers.
        of_origin: accuracy over origin's, None where that is 0.
        agreement: share of answers that are origin's.
        versus_origin: None for origin.
        best_baseline: the most accurate baseline of the same budget; of trained pruners only.
        versus_best: against that one.
        prefill_ms, first_token_ms: medians; None where nothing was timed. Of origin the median of those of all cells.
        prefill_origin_ms, first_token_origin_ms: origin's in the same turns, at the same pace of the machine.
    """

    method: str
    kind: str
    budget: float | None
    reason: str | None
    average_tokens: float | None = None
    llm_flops: float | None = None
    accuracy: float | None = None
    of_origin: float | None = None
    agreement: float | None = None
    versus_origin: Difference | None = None
    best_baseline: str | None = None
    versus_best: Difference | None = None
    prefill_ms: float | None = None
    prefill_origin_ms: float | None = None
    first_token_ms: float | None = None
    first_token_origin_ms: float | None = None


def summarise(cells: list[Cell], results: list[dict[str, Any]], questions: list[Question]) -> list[Row]:
    """A row a cell: origin, then by budget, the largest first and pruners' own last, the most accurate first.

    Args:
        cells: origin first.
        results: as `runner.run_cell` returns them.
    """
    origin = results[0]
    right = [_marks(result, questions) for result in results]
    rows = []
    for cell, result, marks in zip(cells, results, right, strict=True):
        row = Row(cell.method.name, cell.method.kind, cell.budget, result["reason"])
        rows.append(row)
        if row.reason is not None:
            continue
        row.average_tokens = _mean(_mean(entry["tokens_per_layer"]) for entry in result["questions"])
        row.llm_flops = _mean(entry["llm_flops"] for entry in result["questions"])
        row.accuracy, origin_accuracy = _mean(marks), _mean(right[0])
        row.of_origin = row.accuracy / origin_accuracy if origin_accuracy else None
        row.agreement = _mean(_same(result, origin))
        if row.kind != ORIGIN:
            row.versus_origin = compare(marks, right[0])
        for name, medians in result["times_ms"].items():
            setattr(row, f"{name}_ms", medians.get("hard"))
            setattr(row, f"{name}_origin_ms", medians["origin"])
    _add_origins_times(rows)
    _add_best(rows, right)
    return sorted(rows, key=_place)


def _marks(result: dict[str, Any], questions: list[Question]) -> list[bool]:
    if result["reason"] is not None:
        return []
    return [question.is_right(entry["answer"]) for question, entry in zip(questions, result["questions"], strict=True)]


def _same(result: dict[str, Any], origin: dict[str, Any]) -> list[bool]:
    pairs = zip(result["questions"], origin["questions"], strict=True)
    return [normalised(entry["answer"]) == normalised(other["answer"]) for entry, other in pairs]


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _add_origins_times(rows: list[Row]) -> None:
    for name in ("prefill", "first_token"):
        times = [getattr(row, f"{name}_origin_ms") for row in rows]
        if times[0] is not None:
            setattr(rows[0], f"{name}_ms", median(time for time in times if time is not None))
            setattr(rows[0], f"{name}_origin_ms", None)


def best_baseline(rows: Iterable[Row]) -> Row | None:
    """Of rows of one budget the most accurate baseline; of equally accurate ones that with the fewest tokens."""
    reached = [row for row in rows if row.kind == BASELINE and row.reason is None]
    return max(reached, key=lambda row: (row.accuracy, -row.average_tokens), default=None)


def _add_best(rows: list[Row], right: list[list[bool]]) -> None:
    """Against the best baseline of the same budget."""
    for row, marks in zip(rows, right, strict=True):
        if row.kind != PRUNERS or row.budget is None or row.reason is not None:
            continue
        best = best_baseline(other for other in rows if other.budget == row.budget)
        if best is not None:
            row.best_baseline, row.versus_best = best.method, compare(marks, right[rows.index(best)])


def _place(row: Row) -> tuple:
    budget = float("-inf") if row.budget is None else row.budget
    return (row.kind != ORIGIN, -budget, row.reason is not None, -(row.accuracy or 0), row.average_tokens or 0)
