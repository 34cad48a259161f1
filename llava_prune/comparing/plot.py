"""Accuracy against average tokens, a line a method, labelled where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .cells import BASELINE, PRUNERS
from .summary import Row

GREY = "#5f6368"
TRAINED = ("#0b4f9e", "#2f7fd6", "#00a0a8", "#6a3fb5")
OTHERS = ("#c44e52", "#dd8452", "#8c8c00", "#55a868", "#8172b3", "#937860", "#da8bc3", "#7f7f7f", "#b07d2b", "#a03070")
MARKERS = "osv^D<>pXP"
LABEL_HEIGHT = 0.043  # of the axes, between labels


def draw_compare(rows: list[Row], title: str, path: Path) -> None:
    """Write a PNG. Trained pruners are drawn thick, at their own budget as stars; origin is the dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_title(title, fontsize=11, loc="left")
    colours = _colours(rows)
    labels = []
    for number, (name, colour) in enumerate(colours.items()):
        line = [row for row in rows if row.method == name and row.budget is not None and row.reason is None]
        own = [row for row in rows if row.method == name and row.kind == PRUNERS and row.budget is None]
        if line:
            _draw_line(axis, line, colour, MARKERS[number % len(MARKERS)])
        for row in own:
            axis.plot(row.average_tokens, 100 * row.accuracy, "*", color=colour, markersize=15, mec="white", zorder=6)
        if line or own:
            labels.append((max(line or own, key=lambda row: row.average_tokens), colour))
    _draw_origin(axis, rows[0])
    _frame(axis, rows)
    _write_labels(axis, labels)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _colours(rows: list[Row]) -> dict[str, str]:
    """Of each method, trained pruners apart from the others."""
    trained = sorted({row.method for row in rows if row.kind == PRUNERS})
    others = sorted({row.method for row in rows if row.kind == BASELINE})
    palettes = ((trained, TRAINED), (others, OTHERS))
    return {name: palette[i % len(palette)] for names, palette in palettes for i, name in enumerate(names)}


def _draw_line(axis: Any, line: list[Row], colour: str, marker: str) -> None:
    line = sorted(line, key=lambda row: row.average_tokens)
    trained = line[0].kind == PRUNERS
    look = (
        {"linewidth": 2.6, "markersize": 7, "zorder": 5}
        if trained
        else {"linewidth": 1.1, "markersize": 5, "zorder": 3}
    )
    tokens, accuracies = [row.average_tokens for row in line], [100 * row.accuracy for row in line]
    axis.plot(tokens, accuracies, marker=marker, color=colour, markeredgecolor="white", markeredgewidth=0.6, **look)


def _draw_origin(axis: Any, origin: Row) -> None:
    accuracy = 100 * origin.accuracy
    axis.axhline(accuracy, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    text = f"origin: {accuracy:.1f} % with {origin.average_tokens:g} tokens"
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points"}
    axis.annotate(text, (0.01, accuracy), color=GREY, fontsize=9, **place)


def _frame(axis: Any, rows: list[Row]) -> None:
    axis.set_xlabel("vision tokens entering a decoder layer, on average")
    axis.set_ylabel("right answers, %")
    axis.grid(axis="y", color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.03)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.03 * (high - low))
    if any(row.kind == PRUNERS and row.budget is None for row in rows):
        note = "stars: pruners as trained, by threshold"
        axis.annotate(note, (0.99, 0.015), xycoords="axes fraction", ha="right", fontsize=9, color=GREY)


def _write_labels(axis: Any, labels: list[tuple[Row, str]]) -> None:
    """Names in a column right of the axes, each as near to its line's end as the others allow."""
    low, high = axis.get_ylim()
    labels = sorted(labels, key=lambda label: label[0].accuracy)
    ends = [(100 * row.accuracy - low) / (high - low) for row, _ in labels]
    for (row, colour), height in zip(labels, spread(ends, LABEL_HEIGHT), strict=True):
        point = (row.average_tokens, 100 * row.accuracy)
        axis.annotate(
            f"{row.method}  {100 * row.accuracy:.1f}",
            point,
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold" if row.kind == PRUNERS else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def spread(places: list[float], distance: float) -> list[float]:
    """Ascending places in [0, 1] moved as little as it takes to lie `distance` apart (closer if they do not fit)."""
    if not places:
        return []
    distance = min(distance, 1 / max(len(places) - 1, 1))
    groups: list[list[float]] = []  # (centre of the first, members), merged while they overlap
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], distance) < _start(groups[-2], distance) + distance * len(
            groups[-2]
        ):
            last = groups.pop()
            groups[-1] += last
    return [_start(group, distance) + distance * i for group in groups for i in range(len(group))]


def _start(group: list[float], distance: float) -> float:
    """Where the first of a group stands that is centred on its members, inside [0, 1]."""
    length = distance * (len(group) - 1)
    return min(max(sum(group) / len(group) - length / 2, 0), 1 - length)
