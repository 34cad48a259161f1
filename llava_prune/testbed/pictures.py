"""The 5,000 pictures of the `easy-vqa` package, with their labels.

The package states labels only through its questions, and for one picture in ten those leave the shape or the colour
open. So labels are measured from the pixels here; a test checks that they agree with all 48,000 questions it has.
"""

from dataclasses import dataclass

import numpy as np

PALETTE = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "brown": (165, 42, 42),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Pictures:
    """One split of the package.

    Attributes:
        images: (N, 64, 64, 3) uint8 RGB.
        labels: N pairs (shape, color), or words where `words.with_words` added pictures of words.
    """

    images: np.ndarray
    labels: tuple[tuple[str, str] | str, ...]

    def by_label(self) -> dict[tuple[str, str] | str, list[int]]:
        """Indices of the pictures with each label; all 24 pairs (shape, color) occur in both splits."""
        groups: dict[tuple[str, str] | str, list[int]] = {(shape, color): [] for shape in SHAPES for color in COLORS}
        for index, label in enumerate(self.labels):
            groups.setdefault(label, []).append(index)
        return groups


def load_pictures(split: str) -> Pictures:
    """Reads one split, "train" (4,000 pictures) or "test" (1,000), in the package's own order.

    Raises:
        ValueError: `split` is neither.
        ImportError: `easy-vqa` is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the testbed's pictures come from the package easy-vqa: pip install easy-vqa") from error
    from PIL import Image

    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    images = np.stack([np.asarray(Image.open(paths[index]).convert("RGB")) for index in sorted(paths)])
    return Pictures(images, tuple(_label(image) for image in images))


def _label(image: np.ndarray) -> tuple[str, str]:
    """(shape, color) of one (64, 64, 3) picture: its palette colour, and how much of its bounding box that fills."""
    codes = _code(image.astype(np.int32))
    masks = {color: codes == _code(np.array(rgb)) for color, rgb in PALETTE.items()}
    color = max(masks, key=lambda name: np.count_nonzero(masks[name]))
    mask = masks[color]
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    fill = mask.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))
    shape = "rectangle" if fill > 0.98 else "circle" if fill > 0.68 else "triangle"
    return shape, color


def _code(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) integers to (...) integers, one for each colour."""
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
