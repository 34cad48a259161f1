"""An order of samples that depends on seed and epoch alone, so that a resumed run sees what it would have seen."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class SeededSampler(Sampler):
    """Iterates `sampler` with the global torch generator seeded by (seed, epoch) and put back afterwards.

    LLaVA's length-grouped sampler draws from the global generator, whose state at that moment is not saved.
    """

    def __init__(self, sampler: Sampler, seed: int, epoch: Callable[[], int]):
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch  # asked, since accelerate's sharded loader does not pass set_epoch on

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch())
            order = list(self.sampler)
        return iter(order)
