"""`Sample`: one answered question and what each pruning layer kept of its picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .grid import Grid, square_grid


@dataclass(frozen=True)
class Sample:
    """One answered question.

    Attributes:
        picture: image file.
        question: as asked.
        answers: mode -> answer.
        vision_tokens: tokens before pruning.
        grids: where they lie in the picture.
        average_tokens: of those kept, over all decoder layers.
        kept: pruning layer -> indices of kept tokens.
        probabilities: pruning layer -> keep probability of each vision token, NaN where an earlier layer had dropped
            it; empty where none were recorded.
    """

    picture: Path
    question: str
    answers: dict[str, str]
    vision_tokens: int
    grids: tuple[Grid, ...]
    average_tokens: float
    kept: dict[int, list[int]]
    probabilities: dict[int, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What was asked, answered and kept, as plain values for JSON: NaN is None."""
        return {
            "question": self.question,
            "answers": self.answers,
            "average_tokens": self.average_tokens,
            "layers": {
                str(layer): {
                    "kept": kept,
                    "probability": [None if math.isnan(p) else round(p, 6) for p in self.probabilities[layer]],
                }
                for layer, kept in self.kept.items()
            },
        }


def recorded_sample(line: dict[str, Any], picture: Path, question: str, answers: dict[str, str]) -> Sample:
    """A sample from a line that `run --report` wrote, its picture taken to be padded to a square (LLaVA-1.5).

    Raises:
        ValueError: the tokens form no square grid (several images, or any resolution), or the picture is unreadable.
    """
    return Sample(
        picture=picture,
        question=question,
        answers=answers,
        vision_tokens=line["vision_tokens"],
        grids=(square_grid(read_picture(picture).size, line["vision_tokens"]),),
        average_tokens=line["average_tokens"],
        kept={int(layer): kept for layer, kept in line["kept"].items()},
    )


def read_picture(path: Path, longest: int | None = None):
    """The picture in RGB, as a model is given it (no EXIF rotation), no side over `longest` pixels.

    Raises:
        ValueError: there is no such file, or it is no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"no picture {path}") from error
    except OSError as error:
        raise ValueError(f"{path} can not be read as a picture: {error}") from error
    if longest is not None:
        picture.thumbnail((longest, longest))
    return picture
