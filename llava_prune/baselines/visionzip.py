"""VisionZip: the vision tokens that the class token attends to, and a few means of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat
from .features import FeatureBaseline, take

if TYPE_CHECKING:
    from .handle import BaselineHandle

CONTEXTUAL = 10 / 64  # share of the tokens that are means: 10 of 64, 20 of 128, 30 of 192 in the paper


class VisionZip(FeatureBaseline):
    """Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
    arXiv:2412.04467.

    Dominant tokens are those that the vision tower's class token attends to most, summed over heads, in the layer
    whose features LLaVA uses. Of the rest, tokens at equal strides become contextual: each is averaged with those
    whose attention keys (mean over heads) are more like its own than like any other's. They follow the dominant ones.

    The published code keeps the class token on top, adds the mean of the merged tokens to a contextual one instead of
    averaging them, and patches the CLIP classes for attention and keys; here a hook computes the class token's row, of
    CLIP or DINOv2.
    """

    name = "visionzip"

    def __init__(self, handle: BaselineHandle, average_tokens: float):
        super().__init__(handle, average_tokens)
        self.layer = compat.feature_layer(handle.model)
        self._seen: tuple[Tensor, Tensor] | None = None

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        attention, keys = (values.to(features.device) for values in self._seen)
        self._seen = None
        contextual = round(self.keep * CONTEXTUAL)
        order = attention.sort(dim=-1, descending=True, stable=True).indices
        best, index = take(features, order[:, : self.keep - contextual])
        if not contextual:
            return best, index
        others, other_index = take(features, order[:, self.keep - contextual :])
        other_keys, _ = take(keys, other_index)
        place = torch.arange(contextual, device=features.device) * (others.shape[1] // contextual)
        means = average_around(others, F.normalize(other_keys, dim=-1), place)
        return torch.cat([best, means], 1), torch.cat([index, other_index[:, place]], 1)

    def hooks(self, handle: BaselineHandle) -> list[Any]:
        """Also looks at what enters the vision tower's layer."""

        def look(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if handle.state.mode == "origin":
                return
            query, key = compat.queries_and_keys(layer, args[0] if args else kwargs["hidden_states"])
            query, key = query[:, :, :1].float(), key.float()
            paid = (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(-1)
            self._seen = paid.sum(1)[:, 0, 1:], key.mean(1)[:, 1:]

        return [*super().hooks(handle), self.layer.register_forward_pre_hook(look, with_kwargs=True)]


def average_around(tokens: Tensor, keys: Tensor, place: Tensor) -> Tensor:
    """Mean of the tokens whose keys are most like those at each of `place` (K,), which counts as its own.

    Args:
        tokens: (C, N, D).
        keys: (C, N, d), of length 1.
    """
    alike = keys @ keys[:, place].transpose(1, 2)
    alike[:, place] = 2 * torch.eye(len(place), device=keys.device)
    member = F.one_hot(alike.argmax(-1), len(place)).float()
    return (member.transpose(1, 2) @ tokens.float() / member.sum(1)[..., None]).to(tokens.dtype)
