"""Pictures of written words, to be read: cells of a mosaic beside easy-vqa's pictures."""

from functools import cache
from random import Random
from typing import Any

import numpy as np

from .pictures import Pictures

WORDS = tuple(
    "bell bird book coin door drum duck fish frog goat king kite lamp leaf milk moon "
    "nest pear rain rice ring road rose salt ship shoe snow sock star tent tree wolf".split()
)
COPIES = 40  # of each word in each split
MARGIN, LARGEST = 4, 34  # pixels to the side that a word keeps free, and the largest font


def with_words(pictures: Pictures, split: str) -> Pictures:
    """`pictures` and after them `COPIES` of each of `WORDS`, whose label is the word itself.

    Args:
        pictures: of one split; their size is that of the new ones.
        split: its name. Each has copies of its own, with other colours and in other places.

    Raises:
        ImportError: this Pillow has no FreeType, and so no font of any size.
    """
    rng = Random(f"words {split}")
    labels = tuple(word for word in WORDS for _ in range(COPIES))
    side = pictures.images.shape[1]
    drawn = np.stack([draw_word(word, side, rng) for word in labels])
    return Pictures(np.concatenate([pictures.images, drawn]), (*pictures.labels, *labels))


def draw_word(word: str, side: int, rng: Random) -> np.ndarray:
    """(side, side, 3) uint8: `word` in a dark colour on a light one, as large as fits, at a random height."""
    from PIL import Image, ImageDraw

    light, dark = (tuple(rng.randint(*bounds) for _ in range(3)) for bounds in ((200, 255), (0, 90)))
    picture = Image.new("RGB", (side, side), light)
    font = _font(word, side - 2 * MARGIN)
    left, top, right, bottom = font.getbbox(word)
    x = rng.randint(MARGIN // 2, max(side - MARGIN // 2 - (right - left), MARGIN // 2))
    y = rng.randint(side // 7, max(side - side // 7 - (bottom - top), side // 7))
    ImageDraw.Draw(picture).text((x - left, y - top), word, font=font, fill=dark)
    return np.asarray(picture)


@cache
def _font(word: str, width: int) -> Any:
    """Pillow's own font at the largest size at which `word` is at most `width` pixels wide."""
    from PIL import ImageFont

    fonts = (ImageFont.load_default(size=size) for size in range(LARGEST, 0, -1))
    return next(font for font in fonts if font.getlength(word) <= width)
