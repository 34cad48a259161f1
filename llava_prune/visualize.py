"""Pictures of what was kept: the tokens that each pruning layer leaves, drawn over the picture."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import write_atomically
from .sidecar import read_sidecar


@dataclass(frozen=True)
class Sample:
    """One answered question.

    Attributes:
        picture: image file.
        question: as asked.
        answers: mode -> answer.
        vision_tokens: tokens before pruning, a square grid over the picture padded to a square.
        kept: pruning layer -> indices of kept tokens, row by row.
    """

    picture: Path
    question: str
    answers: dict[str, str]
    vision_tokens: int
    kept: dict[int, list[int]]


def kept_mask(sample: Sample, layer: int, width: int, height: int):
    """Which pixels of the picture lie under kept tokens.

    LLaVA pads a picture to a square (`image_aspect_ratio pad`) before it is cut into patches; the padding is undone.

    Returns:
        (height, width) bool array.

    Raises:
        ValueError: the tokens form no square grid (several images, or any resolution).
    """
    import numpy as np

    side = math.isqrt(sample.vision_tokens)
    if side * side != sample.vision_tokens:
        raise ValueError(f"{sample.vision_tokens} vision tokens form no square grid: draw samples with one image")
    grid = np.zeros(side * side, dtype=bool)
    grid[sample.kept[layer]] = True
    square = max(width, height)
    rows = (np.arange(height) + (square - height) // 2) * side // square
    columns = (np.arange(width) + (square - width) // 2) * side // square
    return grid.reshape(side, side)[rows][:, columns]


def draw_kept_tokens(samples: list[Sample], path: str | Path) -> None:
    """Write a PNG: a row a sample, the picture, then one panel a pruning layer with dropped tokens faded out.

    Raises:
        ValueError: no samples, or one without a square grid of tokens.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    if not samples:
        raise ValueError("nothing to draw: give at least one sample with an image")
    layers = sorted(samples[0].kept)
    columns = 2 + len(layers)
    figure = Figure(figsize=(2.3 * columns, 2.5 * len(samples)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(samples), columns, squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        with Image.open(sample.picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        answers = "\n".join(f"{mode}: {text.strip()}" for mode, text in sample.answers.items())
        row[0].text(0, 0.5, f"{textwrap.fill(sample.question, 24)}\n\n{answers}", va="center", fontsize=9)
        row[1].imshow(pixels)
        row[1].set_title(f"{sample.vision_tokens} tokens", fontsize=9)
        for axis, layer in zip(row[2:], layers, strict=True):
            mask = kept_mask(sample, layer, pixels.shape[1], pixels.shape[0])
            axis.imshow(np.where(mask[..., None], pixels, (pixels * 0.12 + 225).astype(np.uint8)))
            axis.set_title(f"layer {layer}: {len(sample.kept[layer])} kept", fontsize=9)
        for axis in row:
            axis.set_axis_off()
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main(argv: list[str]) -> None:
    """Draw questions that `llava_prune run --report` answered."""
    parser = argparse.ArgumentParser(prog="python -m llava_prune visualize", description=__doc__.splitlines()[0])
    parser.add_argument("--question-file", required=True, type=Path, help="LLaVA's question file (JSON lines)")
    parser.add_argument("--image-folder", required=True, type=Path)
    parser.add_argument("--report", required=True, type=Path, help="what `run --report` wrote, in hard mode")
    parser.add_argument("--answers-file", type=Path, action="append", default=[], help="answers to print; repeatable")
    parser.add_argument("--number", type=int, default=6, help="questions to draw")
    parser.add_argument("--out", type=Path, default=Path("kept_tokens.png"))
    args = parser.parse_args(argv)
    questions = [json.loads(line) for line in args.question_file.read_text().splitlines()]
    answers = {f.stem: [json.loads(line)["text"] for line in f.read_text().splitlines()] for f in args.answers_file}
    samples = [
        Sample(
            picture=args.image_folder / question["image"],
            question=question["text"],
            answers={name: texts[i] for name, texts in answers.items()},
            vision_tokens=line["vision_tokens"],
            kept={int(layer): kept for layer, kept in line["kept"].items()},
        )
        for i, (question, line) in enumerate(zip(questions, read_sidecar(args.report), strict=False))
        if line["vision_tokens"]
    ]
    draw_kept_tokens(samples[: args.number], args.out)
    print(f"wrote {args.out}")
