"""Training batches for the tiny LLaVA: token ids made on CPU workers, pixels put together where the pictures lie."""

from collections.abc import Iterator
from random import Random

import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from .mosaic import MosaicSampler
from .questions import KINDS

GRID = (3, 3)
LONGEST_TEXT = 64


class Conversations(IterableDataset):
    """Endless batches of conversations about 3 x 3 mosaics.

    Each batch is `cells` (B, 9) picture indices, `ids` (B, T) the text after the picture, padded with 0 to T =
    `LONGEST_TEXT`, `answers` (B, T) bool, true on the tokens of the answers and their `</s>`, and `kinds` (B,) the
    kind of the first turn.

    Args:
        groups: picture indices by label.
        turn: as made by `tokens.conversation_ids`.
        batch_size: conversations a batch.
        most_turns: each conversation has 1 to this many turns, equally likely.
        seed: each worker draws its own stream from it.
    """

    def __init__(self, groups, turn, batch_size: int, most_turns: int, seed: int):
        self.groups, self.turn, self.batch_size, self.most_turns, self.seed = (
            groups,
            turn,
            batch_size,
            most_turns,
            seed,
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = get_worker_info()
        rng = Random(f"{self.seed} {worker.id if worker else 0}")
        sampler = MosaicSampler(self.groups, GRID, rng)
        while True:
            yield self._batch(sampler, rng)

    def _batch(self, sampler: MosaicSampler, rng: Random) -> tuple[torch.Tensor, ...]:
        cells, kinds = [], []
        ids = torch.zeros(self.batch_size, LONGEST_TEXT, dtype=torch.long)
        answers = torch.zeros(self.batch_size, LONGEST_TEXT, dtype=torch.bool)
        for row in range(self.batch_size):
            kinds.append(rng.randrange(len(KINDS)))
            mosaic = sampler.draw(KINDS[kinds[-1]], rng.randint(1, self.most_turns))
            cells.append(mosaic.pictures)
            text, marks = [], []
            for number, turn in enumerate(mosaic.turns):
                part, answer = self.turn(turn.question, turn.answer, number == 0)
                text += part
                marks += [False] * (len(part) - answer) + [True] * answer
            ids[row, : len(text)] = torch.tensor(text)
            answers[row, : len(text)] = torch.tensor(marks)
        return torch.tensor(cells), ids, answers, torch.tensor(kinds)


def paint_batch(
    images: torch.Tensor,
    cells: torch.Tensor,
    processor,
    flip: bool,
    grid: tuple[int, int] = GRID,
    side: int | None = None,
    mirrored: int | None = None,
) -> torch.Tensor:
    """Mosaics as the model's pixels.

    Args:
        images: (N, 3, S, S) uint8, the pictures.
        cells: (B, rows x columns) indices into them.
        processor: the image processor, for its mean and deviation.
        flip: mirror each picture at random, left to right and top to bottom.
        grid: rows and columns.
        side: as for `mosaic.paint`.
        mirrored: only the first so many pictures are mirrored, None for all; a word would not be one.

    Returns:
        (B, 3, rows x S, columns x S) or (B, 3, side, side) float, normalised as the processor does.
    """
    tiles = images[cells].float()
    if flip:
        may = cells < (len(images) if mirrored is None else mirrored)
        for axis in (-1, -2):
            chosen = may & (torch.rand(cells.shape, device=tiles.device) < 0.5)
            tiles = torch.where(chosen[..., None, None, None], tiles.flip(axis), tiles)
    batch, _, channels, edge, _ = tiles.shape
    rows, columns = grid
    tiles = tiles.view(batch, rows, columns, channels, edge, edge).permute(0, 3, 1, 4, 2, 5)
    pixels = tiles.reshape(batch, channels, rows * edge, columns * edge)
    if side is not None:
        pixels = nn.functional.pad(pixels, (0, side - columns * edge, 0, side - rows * edge), value=255)
    mean, deviation = (
        torch.tensor(x, device=tiles.device).view(3, 1, 1) for x in (processor.image_mean, processor.image_std)
    )
    return (pixels / 255 - mean) / deviation
