"""Which part of the picture each vision token saw: padding, resize and crop undone.

Every step that a picture takes on its way to the vision tower treats its two axes apart, so a grid of tokens is a
span of the picture for each of its rows and each of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Spans = tuple[tuple[float, float], ...]
WHOLE, TILES = "picture", "tiles"


@dataclass(frozen=True)
class Grid:
    """Vision tokens in rows and columns.

    Attributes:
        view: `picture` (seen as a whole) or `tiles` (any resolution: seen again, larger, in tiles).
        first: index of the grid's first token among the sample's vision tokens.
        stride: tokens from one row to the next; columns + 1 where a newline token ends each row.
        rows, columns: start and end of each, as fractions of the picture's height and width. They reach outside
            [0, 1] over padding, and leave out what a crop cut off or what filled no patch.
    """

    view: str
    first: int
    stride: int
    rows: Spans
    columns: Spans

    @property
    def end(self) -> int:
        """Index after the grid's last token, newline included."""
        return self.first + len(self.rows) * self.stride

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def token_map(self, width: int, height: int):
        """(height, width) int array of the token over each pixel's centre, -1 where the model saw nothing."""
        import numpy as np

        row, column = _places(self.rows, height), _places(self.columns, width)
        tokens = self.first + row[:, None] * self.stride + column[None]
        return np.where((row[:, None] >= 0) & (column[None] >= 0), tokens, -1)


@dataclass(frozen=True)
class Tower:
    """A vision tower's square input, and the square patches that it cuts of it; a rest narrower than one is lost.

    Attributes:
        pixels: side of the input.
        patch: side of a patch.
    """

    pixels: int
    patch: int

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.pixels // self.patch

    def spans(self, start: int = 0) -> Spans:
        """Patches along one side of an input that begins at pixel `start`."""
        return tuple((start + i * self.patch, start + (i + 1) * self.patch) for i in range(self.side))


def single_grid(
    size: tuple[int, int], tower: Tower, processor: Mapping[str, Any], pad: bool, vision_tokens: int
) -> Grid:
    """A picture seen once: padded to a square or not, resized, its centre cut out.

    Args:
        size: the picture's width and height.
        processor: the image processor's settings: `do_resize`, `size`, `do_center_crop`, `crop_size`.
        pad: whether the picture was first centred in a square (`image_aspect_ratio pad`).
        vision_tokens: of the sample; one more than the patches is a class token, which stands first.

    Raises:
        ValueError: the tokens are not one picture's patches.
    """
    first = vision_tokens - tower.side**2
    if first not in (0, 1):
        raise ValueError(
            f"{vision_tokens} vision tokens are not the {tower.side} x {tower.side} patches of one picture, so they "
            "have no place in it: tokens can be drawn for one image a question, neither merged nor cut off"
        )
    padded = (max(size), max(size)) if pad else size
    resized = _resized(padded, processor)
    crop = _crop(processor) or resized
    axes = []
    for own, around, seen, cut in zip(size, padded, resized, crop, strict=True):
        spans = tower.spans((seen - cut) // 2)  # in the resized picture
        axes.append(_mapped(spans, around / seen / own, (around - own) // 2 / own))
    return Grid(WHOLE, first, tower.side, rows=axes[1], columns=axes[0])


def square_grid(size: tuple[int, int], vision_tokens: int) -> Grid:
    """LLaVA-1.5's way, where nothing else is known: the picture padded to a square and resized to the patches.

    Raises:
        ValueError: the tokens form no square (several images, or any resolution).
    """
    side = math.isqrt(vision_tokens)
    if not side or side * side != vision_tokens:
        raise ValueError(f"{vision_tokens} vision tokens form no square grid: draw samples with one image")
    return single_grid(size, Tower(side, 1), {"do_resize": True, "size": {"shortest_edge": side}}, True, vision_tokens)


def anyres_grids(
    size: tuple[int, int],
    tower: Tower,
    canvas: tuple[int, int],
    rows: range,
    columns: range,
    shape: tuple[int, int] | None = None,
    newline: bool = True,
) -> tuple[Grid, Grid]:
    """A picture seen at any resolution (LLaVA-NeXT): stretched to one tile, then fitted into a canvas of tiles.

    Args:
        size: the picture's width and height.
        canvas: width and height of all tiles together, in pixels.
        rows, columns: those of the canvas's patches that are left when its padding is taken off.
        shape: rows and columns that these were resampled to (LLaVA-OneVision), or None.
        newline: whether a newline token ends each row.
    """
    stretched = _mapped(tower.spans(), 1 / tower.pixels, 0)
    whole = Grid(WHOLE, 0, tower.side, stretched, stretched)
    scale = min(side / own for side, own in zip(canvas, size, strict=True))
    axes = []
    for own, side, left, count in zip(size, canvas, (columns, rows), (shape or (None, None))[::-1], strict=True):
        fitted = min(math.ceil(own * scale), side)
        spans = [span for start in range(0, side, tower.pixels) for span in tower.spans(start)]
        spans = _resampled(spans[left.start : left.stop], count or len(left))
        axes.append(_mapped(spans, 1 / fitted, (side - fitted) // 2 / fitted))
    return whole, Grid(TILES, whole.end, len(axes[0]) + newline, rows=axes[1], columns=axes[0])


def _resized(size: tuple[int, int], processor: Mapping[str, Any]) -> tuple[int, int]:
    if not processor.get("do_resize"):
        return size
    target = processor["size"]
    if target.get("shortest_edge"):
        short = min(size)
        return tuple(target["shortest_edge"] * side // short for side in size)
    return target["width"], target["height"]


def _crop(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    if not processor.get("do_center_crop"):
        return None
    return processor["crop_size"]["width"], processor["crop_size"]["height"]


def _mapped(spans: Sequence[tuple[float, float]], scale: float, shift: float) -> Spans:
    return tuple((start * scale - shift, end * scale - shift) for start, end in spans)


def _resampled(spans: Sequence[tuple[float, float]], count: int) -> Spans:
    """`count` spans, equally wide in patches, in place of these."""
    if count == len(spans):
        return tuple(spans)

    def edge(place: float) -> float:
        whole = min(int(place), len(spans) - 1)
        start, end = spans[whole]
        return start + (place - whole) * (end - start)

    step = len(spans) / count
    return tuple((edge(i * step), edge((i + 1) * step)) for i in range(count))


def _places(spans: Spans, pixels: int):
    """(pixels,) index of the span over each pixel's centre, -1 where there is none."""
    import numpy as np

    centres = (np.arange(pixels) + 0.5) / pixels
    starts, ends = np.array(spans).T
    place = np.searchsorted(starts, centres, side="right") - 1
    return np.where((place >= 0) & (centres < ends[place]), place, -1)
