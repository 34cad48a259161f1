"""Kept tokens as a PNG: a block a question, a column a pruning layer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .sample import Sample, read_picture

LONGEST = 640  # pixels of a drawn picture's longer side
COLOURS = "viridis"
# inches
CAPTION, WHOLE, PANEL, TITLE, LINE, GAP, COLOUR_BAR = 2.3, 3.0, 2.2, 0.28, 0.155, 0.15, 0.65
TALLEST = 1.6  # of a panel, times its width


def draw_kept_tokens(samples: Sequence[Sample], path: str | Path) -> None:
    """Write a PNG: for each sample its question, answers and picture, and a column a pruning layer.

    The upper panel of a column is the keep probability over the picture (where it was recorded), the lower one the
    picture with dropped tokens faded out. Pictures seen at any resolution have such a pair for each view.

    Raises:
        ValueError: no samples, they have different pruning layers, or a picture is unreadable.
        ImportError: no matplotlib.
    """
    if not samples:
        raise ValueError("nothing to draw: give at least one sample with an image")
    layers = sorted(samples[0].kept)
    if any(sorted(sample.kept) != layers for sample in samples):
        raise ValueError("the samples have different pruning layers: draw those of one model together")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = [_Block(sample) for sample in samples]
    shown = any(sample.probabilities for sample in samples)
    width = CAPTION + WHOLE + len(layers) * (PANEL + GAP) + 2 * GAP
    height = GAP + sum(block.height for block in blocks) + COLOUR_BAR * shown
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    top = GAP
    for block in blocks:
        block.draw(figure, top, layers)
        top += block.height
    if shown:
        _draw_colour_bar(figure, GAP + CAPTION, top + 0.1)
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=110))


class _Block:
    """One sample's part of the figure: caption, picture, and lines of a panel a layer."""

    def __init__(self, sample: Sample):
        self.sample, self.picture = sample, read_picture(sample.picture, LONGEST)
        answers = [textwrap.fill(f"{mode}: {text.strip()}", 30) for mode, text in sample.answers.items()]
        self.question = textwrap.fill(sample.question, 26)
        self.rest = "\n".join([*answers, f"{sample.average_tokens:.1f} average tokens"])
        self.line = TITLE + PANEL * min(TALLEST, self.picture.height / self.picture.width)
        self.panels = self.line * len(sample.grids) * (2 if sample.probabilities else 1)
        written = TITLE + LINE * (self.question.count("\n") + self.rest.count("\n") + 3)
        self.height = max(written, self.panels) + GAP

    def draw(self, figure: Any, top: float, layers: list[int]) -> None:
        """Draw from `top` inches under the figure's upper edge."""
        under = top + TITLE + LINE * (self.question.count("\n") + 1.5)
        _write(figure, self.question, top + TITLE, weight="bold")
        _write(figure, self.rest, under)
        title = f"{self.sample.vision_tokens} tokens"
        _show(figure, self.picture, title, GAP + CAPTION, top, WHOLE, self.panels)
        for line, drawings in enumerate(_drawings(self.sample, self.picture, layers)):
            for column, (title, pixels) in enumerate(drawings):
                left = GAP + CAPTION + WHOLE + GAP + column * (PANEL + GAP)
                _show(figure, pixels, title, left, top + line * self.line, PANEL, self.line)


def require_matplotlib() -> None:
    """Raises ImportError with what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a PNG needs matplotlib: pip install matplotlib") from error


def _write(figure: Any, text: str, top: float, **style: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(GAP / width, 1 - top / height, text, va="top", fontsize=9, parse_math=False, **style)


def _axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _show(figure: Any, pixels: Any, title: str, left: float, top: float, width: float, height: float) -> None:
    """A titled picture at the top of a place in inches."""
    axis = _axes(figure, left, top + TITLE, width, height - TITLE)
    axis.imshow(pixels)
    axis.set_title(title, fontsize=8.5)
    axis.set(xticks=[], yticks=[], anchor="N")
    axis.spines[:].set_color("0.8")


def _draw_colour_bar(figure: Any, left: float, top: float) -> None:
    from matplotlib.cm import ScalarMappable

    axis = _axes(figure, left, top, WHOLE, 0.12)
    figure.colorbar(ScalarMappable(cmap=COLOURS), cax=axis, orientation="horizontal")
    axis.set_xlabel("keep probability (white: dropped before; striped: not seen)", fontsize=8)
    axis.tick_params(labelsize=8)


def _drawings(sample: Sample, picture: Any, layers: list[int]) -> list[list[tuple[str, Any]]]:
    """Rows of panels, one a layer: its title and (H, W, 3) uint8 pixels."""
    import numpy as np

    pixels, rows = np.asarray(picture), []
    for grid in sample.grids:
        tokens = grid.token_map(*picture.size)
        view = "" if len(sample.grids) == 1 else f", {grid.view}"
        if sample.probabilities:
            heats = [_heat(pixels, tokens, np.array(sample.probabilities[layer])) for layer in layers]
            titles = [f"layer {layer}{view}: keep probability" for layer in layers]
            rows.append(list(zip(titles, heats, strict=True)))
        rows.append([])
        for layer in layers:
            kept = np.zeros(sample.vision_tokens, dtype=bool)
            kept[sample.kept[layer]] = True
            title = f"layer {layer}{view}: {kept[grid.first : grid.end].sum()} kept"
            rows[-1].append((title, _faded(pixels, tokens, kept)))
    return rows


def _heat(pixels: Any, tokens: Any, probability: Any) -> Any:
    """(H, W, 3) uint8, the picture in grey under the colours of the probability; faded where that is NaN."""
    import numpy as np
    from matplotlib import colormaps

    values = probability[tokens]
    grey = pixels.mean(-1, keepdims=True)
    coloured = 0.3 * grey + 0.7 * 255 * colormaps[COLOURS](np.nan_to_num(values))[..., :3]
    shown = np.where(np.isnan(values)[..., None], _pale(grey), coloured)
    return _striped(shown, tokens)


def _faded(pixels: Any, tokens: Any, kept: Any) -> Any:
    """(H, W, 3) uint8, the picture with the dropped tokens faded out."""
    import numpy as np

    return _striped(np.where(kept[tokens][..., None], pixels, _pale(pixels)), tokens)


def _pale(pixels: Any) -> Any:
    return pixels * 0.12 + 225


def _striped(shown: Any, tokens: Any) -> Any:
    """Stripes where the model saw nothing (token -1)."""
    import numpy as np

    rows, columns = np.indices(tokens.shape)
    wide = max(tokens.shape) // 40 + 1
    stripes = np.where((rows + columns) // wide % 2, 150, 185)
    return np.where((tokens < 0)[..., None], stripes[..., None], shown).astype(np.uint8)
