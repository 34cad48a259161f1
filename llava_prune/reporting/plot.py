"""The report as a picture: tokens over the decoder's depth, and what is left of each cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically

GREY, BLUE = "#9aa0a6", "#2f6fb0"


def cost_ratios(result: dict[str, Any]) -> dict[str, float]:
    """Pruned over origin of what has both, by the label it is drawn under."""
    ratios = result["ratios"]
    rows = {
        "average tokens": ratios["average_tokens"],
        "LLM FLOPs, pruners included": ratios["flops"]["llm_and_modules"],
        "KV cache": ratios["kv_bytes"]["measured"],
        "time to first token": ratios["times_ms"]["first_token"]["median"],
        "prefill": ratios["times_ms"]["prefill"]["median"],
        "decode per token": ratios["times_ms"]["decode_token"]["median"],
        "peak memory": ratios["peak_memory_bytes"],
    }
    return {label: ratio for label, ratio in rows.items() if ratio is not None}


def draw_report(result: dict[str, Any], path: str | Path) -> None:
    """Write a PNG with two panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    tokens, costs = figure.subplots(1, 2, width_ratios=(1, 1))
    _draw_tokens(tokens, result)
    _draw_costs(costs, result)
    model = result["model"]
    weights = "" if model["weights"] == "checkpoint" else ", random weights"
    figure.suptitle(f"{model['name']}{weights} on {model['device']}, {model['dtype']}", fontsize=11)
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def _draw_tokens(axis: Any, result: dict[str, Any]) -> None:
    edges = list(range(result["model"]["decoder_layers"] + 1))
    for (mode, figures), colour in zip(result["modes"].items(), (GREY, BLUE), strict=True):
        label = f"{mode}: {figures['average_tokens']:.1f} on average"
        counts = figures["tokens_per_layer"]
        axis.stairs(counts, edges, fill=True, color=colour, alpha=0.25)
        axis.stairs(counts, edges, baseline=None, color=colour, linewidth=2, label=label)
    axis.set_xlim(0, edges[-1])
    axis.set_ylim(0, 1.18 * max(result["modes"]["origin"]["tokens_per_layer"]))
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("vision tokens entering it")
    axis.legend(frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_costs(axis: Any, result: dict[str, Any]) -> None:
    ratios = cost_ratios(result)
    labels, values = list(ratios)[::-1], list(ratios.values())[::-1]
    axis.barh(labels, values, height=0.62, color=BLUE)
    axis.axvline(1, color=GREY, linewidth=2)
    for place, value in enumerate(values):
        inside = value > 0.2
        at = value + (-0.015 if inside else 0.015)
        look = {"ha": "right" if inside else "left", "color": "white" if inside else "black"}
        axis.text(at, place, f"{value:.2f}", va="center", fontsize=9, **look)
    axis.set_xlim(0, 1.05 * max(1, *values))
    axis.set_xlabel(f"{list(result['modes'])[1]} / origin")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
