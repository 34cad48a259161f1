"""What methods share that hand fewer vision features to the decoder: a hook on the projector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import compat
from ..budget import UnreachableBudget
from ..layout import TokenLayout

if TYPE_CHECKING:
    from ..flops import DecoderShape
    from ..report import Report
    from .handle import BaselineHandle


@dataclass(frozen=True)
class Reduction:
    """What a method did to the images of the running call.

    Attributes:
        tokens: features of an image before.
        kept: (C, K) long, what is left of each of the C images, or None from a method that blends them.
        images: C. LLaVA encodes one for a sample without any.
        keep: features of an image after.
    """

    tokens: int
    kept: Tensor | None
    images: int
    keep: int

    def describe(self, layout: TokenLayout) -> TokenLayout:
        """The decoder's layout, told what it was before."""
        sizes = tuple(size._replace(images=size.vision // self.keep) for size in layout.sizes)
        images = [size.images for size in sizes]
        count = torch.tensor(images, device=layout.vision.device)
        changes: dict[str, Any] = {"num_images": count, "original_counts": count * self.tokens, "sizes": sizes}
        if self.kept is not None:
            flags = torch.zeros(self.images, self.tokens, dtype=torch.bool, device=self.kept.device)
            flags = flags.scatter(1, self.kept, True).to(count.device)
            taken = count if sum(images) == self.images else count.clamp(min=1)
            place = torch.arange(max(images), device=count.device)
            index = (taken.cumsum(0) - taken)[:, None] + place
            own = flags[index.clamp(max=self.images - 1)] & (place < count[:, None])[..., None]
            changes["kept"] = own.flatten(1)
        return replace(layout, **changes)


class FeatureBaseline:
    """Makes `keep` features of every image's `tokens`, in every mode but origin.

    Kept tokens have consecutive positions in the decoder, as in the published code of these methods.

    Attributes:
        name: as in `attach_baseline`.
        after_projector: whether it works on the projector's output rather than its input.
    """

    name: str
    after_projector = False

    def __init__(self, handle: BaselineHandle, average_tokens: float):
        if handle.vision_tokens is None:
            raise ValueError(
                f"{self.name}: the vision tokens of an image are not fixed in this model (any resolution), and it "
                "keeps as many of each. Use fastv, pyramiddrop or sparsevlm"
            )
        self.tokens = handle.vision_tokens
        if average_tokens < 1:
            raise UnreachableBudget(
                f"{self.name}: {average_tokens:g} average tokens are under its floor of 1 for {self.tokens} vision "
                "tokens. Raise average_tokens"
            )
        self.keep = min(int(average_tokens), self.tokens)

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """(C, tokens, D) -> (C, keep, D), and the (C, keep) indices of what is left or None."""
        raise NotImplementedError

    def flops(self, shape: DecoderShape, report: Report) -> Tensor:
        """(B,) zeros: nothing is computed in the decoder; what the method does before it is not counted."""
        return torch.zeros(len(report.text_tokens), dtype=torch.float64)

    def hooks(self, handle: BaselineHandle) -> list[Any]:
        """Put the method before or after the projector."""
        state, (_, projector) = handle.state, compat.vision_modules(handle.model)

        def reduced(features: Tensor) -> Tensor:
            if features.shape[1] != self.tokens:
                raise ValueError(
                    f"{self.name} was set up for {self.tokens} features an image and got {features.shape[1]}: the "
                    "vision tower must hand on patch features alone"
                )
            fewer, kept = self(features)
            state.reduction = Reduction(self.tokens, kept, len(features), self.keep)
            return fewer

        def acts() -> bool:
            return state.mode != "origin" and self.keep < self.tokens

        if self.after_projector:
            return [projector.register_forward_hook(lambda _, args, output: reduced(output) if acts() else None)]
        return [projector.register_forward_pre_hook(lambda _, args: (reduced(args[0]), *args[1:]) if acts() else None)]


def take(features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Features (C, N, D) at `index` (C, K) in their own order, and the sorted index."""
    index = index.sort(-1).values
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1])), index
