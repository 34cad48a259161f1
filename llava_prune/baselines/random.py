"""Random vision tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import compat
from .features import FeatureBaseline, take

if TYPE_CHECKING:
    from .handle import BaselineHandle


class Random(FeatureBaseline):
    """Tokens drawn uniformly without replacement, before the decoder.

    The floor that a method has to beat, and many do not (Wen et al., "Token Pruning in Multimodal Large Language
    Models: Are We Solving the Right Problem?", Findings of ACL 2025, arXiv:2502.11501).

    A draw depends on `seed` and the picture's pixels alone: each picture has its own, in any batch and every run.

    Args:
        seed: another seed, other draws.
    """

    name = "random"

    def __init__(self, handle: BaselineHandle, average_tokens: float, seed: int = 0):
        super().__init__(handle, average_tokens)
        self.seed = seed
        self._pixel_sums: list[int] = []

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        draws = [
            torch.randperm(self.tokens, generator=torch.Generator().manual_seed((total + self.seed) % 2**63))
            for total in self._pixel_sums
        ]
        return take(features, torch.stack(draws)[:, : self.keep].to(features.device))

    def hooks(self, handle: BaselineHandle) -> list[Any]:
        """Also looks at what the vision tower is given."""

        def look(_tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if handle.state.mode == "origin":
                return
            pixels = args[0] if args else kwargs["pixel_values"]
            # whole numbers add up to the same in any order and any batch
            whole = pixels.detach().float().contiguous().view(torch.int32)
            self._pixel_sums = whole.flatten(1).sum(1, dtype=torch.int64).tolist()

        tower, _ = compat.vision_modules(handle.model)
        return [*super().hooks(handle), tower.register_forward_pre_hook(look, with_kwargs=True)]
