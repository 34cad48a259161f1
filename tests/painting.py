"""Pictures that say at every pixel which token lies over it, and what a vision tower then sees in its patches."""

import numpy as np
import torch
from PIL import Image

STEP = 15  # grey levels between two rows; red counts rows, green columns, at most 17 of them
SIZES = [(520, 360), (301, 420), (384, 384), (333, 120)]


def painted(grid, size):
    """A picture whose red and green are the row and column of the token over each pixel, blue 255 where none is."""
    tokens = grid.token_map(*size)
    row, column = np.divmod(tokens - grid.first, grid.stride)
    pixels = np.stack([row * STEP, column * STEP, 0 * row], -1)
    return Image.fromarray(np.where((tokens < 0)[..., None], [0, 0, 255], pixels).astype(np.uint8))


def seen(pixel_values, processor, patch, margin=2):
    """Rows, columns and blue in the patches of (crops, 3, P, P) processed pixels.

    Returns:
        lowest and highest of each patch away from its edge (where resampling mixes neighbours), (crops, N, 3) each.
    """
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    values = (torch.as_tensor(pixel_values) * deviation + mean) * 255 / STEP
    patches = values.unfold(2, patch, patch).unfold(3, patch, patch)[..., margin:-margin, margin:-margin]
    patches = patches.flatten(4).flatten(2, 3).permute(0, 2, 1, 3)
    return patches.amin(-1), patches.amax(-1)


def check_patches(low, high, grid):
    """Every patch that lies within the picture saw the token that it is, and nothing of its neighbours.

    Args:
        low, high: (N, 3) from `seen`, in the order of the grid's tokens, newlines left out.
    """
    inside = [[all(0 <= edge <= 1 for edge in span) for span in spans] for spans in (grid.rows, grid.columns)]
    checked = 0
    for row, column in np.argwhere(np.outer(*inside)):
        token = row * len(grid.columns) + column
        for values in (low[token], high[token]):
            assert abs(values[0] - row) < 0.5 and abs(values[1] - column) < 0.5 and values[2] < 0.9, (row, column)
        checked += 1
    assert checked >= len(grid.rows) * len(grid.columns) // 4
