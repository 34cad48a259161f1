"""Tables of mini: what `compare` wrote, seeds shown as mean and 95 % interval."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import mean
from typing import Any

from ...checkpoint import write_atomically
from ...comparing.cells import BASELINE, ORIGIN, PRUNERS
from ...comparing.plot import draw_compare
from ...comparing.summary import Row, best_baseline
from .ablations import ADAPTED, MAIN
from .comparisons import Comparison
from .intervals import of_seeds, of_share
from .size import MiniSize
from .trainings import Training

WIDTH = 180  # columns of a screen that the tables need
NOTES = (
    "ours: pruners trained for the budget. 'exactly': the best tokens of each question up to the budget; 'threshold': "
    "as trained, so that questions share the budget",
    "adapted: the same pruners, and LoRA on the base that learned to answer from what they keep, one for all budgets; "
    "'of origin' is of the base without it; a baseline has an adapter of its own for each budget, of one seed",
    "intervals are of 95 %: of ours Student's over the seeds, of the others Wilson's over the questions",
    "against best: percentage points to the best baseline of the budget, and of each seed the paired interval over "
    "the questions",
)


def write_results(
    out: Path,
    size: MiniSize,
    questions: int,
    trainings: dict[float, list[Training]],
    compared: dict[float, Comparison],
    adapted: list[Comparison],
    timings: dict[float, Comparison],
) -> None:
    """`results.json`, `results.csv`, `results.png` and the table on the screen."""
    lines: list[dict[str, Any]] = []
    for budget, comparison in compared.items():
        rows = comparison.rows()
        times = {_label(row): row for row in timings[budget].rows()} if budget in timings else {}
        if not lines:
            lines.append(_line_of(rows[0], None, questions))
        lines += [_line_of(row, budget, questions) for row in rows if row["kind"] == BASELINE]
        lines += _lines_of_ours(rows, budget, comparison)
        lines += _line_of_adapted(adapted, budget, rows)
        lines += _lines_of_adapted_baselines(adapted, budget, rows, questions)
        for line in lines:
            if line["budget"] == budget and (timed := times.get(line["method"])):
                line["prefill_ms"], line["prefill_origin_ms"] = timed["prefill_ms"], timed["prefill_origin_ms"]
    stability = {f"{budget:g}": _stability(row) for budget, row in trainings.items()}
    for budget, row in trainings.items():
        if any(training.collapsed for training in row):
            print(f"at {budget:g}, {sum(training.collapsed for training in row)} of {len(row)} trainings collapsed")
    _write(out, "results", lines, {"model": size.name, "questions": questions, "stability": stability})
    _print("mini", lines)
    _draw(out / "results.png", size, questions, lines)
    for note in NOTES:
        print(note)


def _label(row: dict[str, Any]) -> str:
    """Of pruners, whichever seed it is."""
    if row["kind"] != PRUNERS:
        return row["method"]
    return f"{MAIN}, threshold" if row["budget"] is None else f"{MAIN}, exactly"


def _line_of(row: dict[str, Any], budget: float | None, questions: int) -> dict[str, Any]:
    """Of a baseline or origin."""
    known = row["reason"] is None
    low, high = of_share(row["accuracy"], questions) if known else (None, None)
    return {
        "method": row["method"],
        "kind": row["kind"],
        "budget": budget,
        "seeds": 1,
        "reason": row["reason"],
        "average_tokens": row["average_tokens"],
        "accuracy": row["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        "of_origin": row["of_origin"],
        "agreement": row["agreement"],
        "llm_flops": row["llm_flops"],
        "best_baseline": None,
        "versus_best": None,
        "versus_best_seeds": None,
        "prefill_ms": None,
        "prefill_origin_ms": None,
    }


def _lines_of_ours(rows: list[dict[str, Any]], budget: float, comparison: Comparison) -> list[dict[str, Any]]:
    """At the budget exactly, and by threshold if trained so; a line of either over the seeds that did not collapse."""
    best = best_baseline(Row(**row) for row in rows)
    lines = []
    by_threshold = any(training.selection == "threshold" for training in comparison.trainings.values())
    for exactly in (True, False) if by_threshold else (True,):
        ours = [row for row in rows if row["kind"] == PRUNERS and (row["budget"] is not None) == exactly]
        ours = [row for row in ours if row["reason"] is None]
        if not ours:
            continue
        accuracy, low, high = of_seeds([row["accuracy"] for row in ours])
        line = _line_of(ours[0], budget, 1)
        line |= {"method": _label(ours[0]), "seeds": len(ours), "accuracy": accuracy}
        line |= {"accuracy_low": low, "accuracy_high": high}
        for name in ("average_tokens", "of_origin", "agreement", "llm_flops"):
            values = [row[name] for row in ours if row[name] is not None]
            line[name] = mean(values) if values else None
        if best is not None:
            line["best_baseline"], line["versus_best"] = best.method, accuracy - best.accuracy
            line["versus_best_seeds"] = [row["versus_best"] for row in ours if row["versus_best"]]
        lines.append(line)
    return lines


def _line_of_adapted(adapted: list[Comparison], budget: float, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds, as a share of the base's own origin, beside the best baseline on the base."""
    found = [row for comparison in adapted for row in comparison.rows()]
    ours = [row for row in found if row["kind"] == PRUNERS and row["budget"] == budget and row["reason"] is None]
    if not ours:
        return []
    accuracy, low, high = of_seeds([row["accuracy"] for row in ours])
    origin = next(row["accuracy"] for row in rows if row["kind"] == ORIGIN)
    line = _line_of(ours[0], budget, 1)
    line |= {"method": f"{MAIN}, {ADAPTED}", "seeds": len(ours), "accuracy": accuracy, "agreement": None}
    line |= {"accuracy_low": low, "accuracy_high": high, "of_origin": accuracy / origin if origin else None}
    for name in ("average_tokens", "llm_flops"):
        line[name] = mean(row[name] for row in ours)
    if (best := best_baseline(Row(**row) for row in rows)) is not None:
        line["best_baseline"], line["versus_best"] = best.method, accuracy - best.accuracy
        line["versus_best_seeds"] = []
    return [line]


def _lines_of_adapted_baselines(
    adapted: list[Comparison], budget: float, rows: list[dict[str, Any]], questions: int
) -> list[dict[str, Any]]:
    """Each with an adapter of its own for the budget, of one seed, as a share of the base's own origin."""
    origin = next(row["accuracy"] for row in rows if row["kind"] == ORIGIN)
    lines = []
    for row in (row for comparison in adapted for row in comparison.rows()):
        if row["kind"] == BASELINE and row["budget"] == budget:
            line = _line_of(row, budget, questions)
            share = line["accuracy"] / origin if origin and row["reason"] is None else None
            lines.append(line | {"method": f"{row['method']}, {ADAPTED}", "of_origin": share, "agreement": None})
    return lines


def write_transfer(
    out: Path, questions: int, compared: dict[str, Comparison], adapted: dict[str, list[Comparison]]
) -> None:
    """`transfer.json`, `transfer.csv` and the table on the screen."""
    lines = []
    for name, comparison in compared.items():
        rows = comparison.rows()
        budget = next((row["budget"] for row in rows if row["budget"] is not None), 0.0)
        part = [_line_of(rows[0], None, questions)]
        part += [_line_of(row, budget, questions) for row in rows if row["kind"] == BASELINE]
        part += _lines_of_ours(rows, budget, comparison) + _line_of_adapted(adapted[name], budget, rows)
        lines += [{"set": name, **line} for line in part]
    _write(out, "transfer", lines, {"questions": questions})
    for name in compared:
        _print(name, [line for line in lines if line["set"] == name])


def write_ablations(
    out: Path, budget: float, trainings: dict[str, list[Training]], compared: dict[str, list[Comparison]]
) -> None:
    """`ablations.json`, `ablations.csv` and the table on the screen."""
    from rich.console import Console
    from rich.table import Table

    lines = []
    for variant, row in trainings.items():
        rows = [each for comparison in compared[variant] for each in comparison.rows()]
        line: dict[str, Any] = {"variant": variant, **_stability(row)}
        for name, exactly in (("exactly", True), ("threshold", False)):
            ours = [r for r in rows if r["kind"] == PRUNERS and (r["budget"] is not None) == exactly]
            ours = [r for r in ours if r["reason"] is None]
            figures = of_seeds([r["accuracy"] for r in ours]) if ours else (None, None, None)
            line |= dict(zip((f"{name}_accuracy", f"{name}_low", f"{name}_high"), figures, strict=True))
            line[f"{name}_tokens"] = mean(r["average_tokens"] for r in ours) if ours else None
        line["origin_accuracy"] = mean(r["accuracy"] for r in rows if r["kind"] == ORIGIN) if rows else None
        lines.append(line)
    _write(out, "ablations", lines, {"budget": budget})
    table = Table(title=f"ablations at {budget:g} average tokens, accuracy as mean [95 % interval] of the seeds")
    for name in ("variant", "seeds", "collapsed", "exactly", "threshold", "tokens", "D mean", "D last", "loss"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for line in lines:
        table.add_row(
            line["variant"],
            str(line["seeds"]),
            str(line["collapsed"]),
            _interval(*(line[f"exactly_{part}"] for part in ("accuracy", "low", "high"))),
            _interval(*(line[f"threshold_{part}"] for part in ("accuracy", "low", "high"))),
            _number(line["threshold_tokens"], "{:.1f}"),
            _number(line["d_accuracy_mean"], "{:.2f}"),
            _number(line["d_accuracy_last"], "{:.2f}"),
            _number(line["task_loss_last"], "{:.3f}"),
        )
    Console(width=max(Console().width, WIDTH)).print(table)


def _stability(row: list[Training]) -> dict[str, Any]:
    """Of the trainings of one kind: how many collapsed, and how the adversary did."""
    histories = [[entry for entry in training.history() if "loss/task" in entry] for training in row]
    histories = [history for history in histories if history]
    accuracies = [
        [(entry["gan/d_acc_real"] + entry["gan/d_acc_fake"]) / 2 for entry in history if "gan/d_acc_real" in entry]
        for history in histories
    ]
    accuracies = [values for values in accuracies if values]
    return {
        "seeds": len(row),
        "collapsed": sum(training.collapsed for training in row),
        "d_accuracy_mean": mean(map(mean, accuracies)) if accuracies else None,
        "d_accuracy_last": mean(values[-1] for values in accuracies) if accuracies else None,
        "task_loss_last": mean(history[-1]["loss/task"] for history in histories) if histories else None,
        "seconds": mean(training.job.record["seconds"] for training in row),
    }


def _write(out: Path, name: str, lines: list[dict[str, Any]], more: dict[str, Any]) -> None:
    text = json.dumps({**more, "rows": lines}, indent=2) + "\n"
    write_atomically(out / f"{name}.json", lambda path: path.write_text(text))

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            names = [name for name in lines[0] if name != "versus_best_seeds"]  # a list, of the JSON alone
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(out / f"{name}.csv", write)


def _print(title: str, lines: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("method", "budget", "tokens", "accuracy", "of origin", "against best", "LLM GFLOPs", "prefill, ms"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line in lines:
        table.add_row(
            line["method"],
            _number(line["budget"], "{:g}"),
            _number(line["average_tokens"], "{:.1f}"),
            line["reason"]
            and "unreachable"
            or _interval(*(line[f"accuracy{part}"] for part in ("", "_low", "_high"))),
            _number(line["of_origin"], "{:.1%}"),
            _against(line),
            _number(line["llm_flops"] and line["llm_flops"] / 1e9, "{:.4g}"),
            _number(line["prefill_ms"], "{:.1f}") + _number(line["prefill_origin_ms"], " / {:.1f}"),
            style="bold" if line["kind"] == PRUNERS else None,
        )
    Console(width=max(Console().width, WIDTH)).print(table)


def _against(line: dict[str, Any]) -> str:
    if line["versus_best"] is None:
        return ""
    seeds = ["[{:+.1f}, {:+.1f}]".format(100 * s["low"], 100 * s["high"]) for s in line["versus_best_seeds"]]
    return f"{100 * line['versus_best']:+.2f} {line['best_baseline']} {' '.join(seeds)}"


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else shape.format(value)


def _interval(centre: float | None, low: float | None, high: float | None) -> str:
    return "" if centre is None else f"{centre:.2%} [{low:.2%}, {high:.2%}]"


def _draw(path: Path, size: MiniSize, questions: int, lines: list[dict[str, Any]]) -> None:
    """As `compare` draws it: a line a method over the budgets, ours as the mean over seeds."""
    rows = []
    for line in lines:
        names = ("method", "kind", "budget", "reason", "average_tokens", "llm_flops", "accuracy", "of_origin")
        rows.append(Row(**{name: line[name] for name in names}))
    draw_compare(rows, f"{size.name}, {questions} questions", path)
