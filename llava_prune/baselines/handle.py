"""`BaselineHandle`: a training-free method where a `PruneHandle` has trained pruners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import compat
from ..config import PruneConfig
from ..patch import PruneHandle, Pruners
from ..placeholders import Shrinking
from ..scoring import LayerView
from ..state import INFERENCE_MODES
from .decoder import DecoderBaseline
from .features import FeatureBaseline


class BaselineHandle(PruneHandle):
    """What `attach_baseline` returns.

    Attributes:
        method: the method.
        average_tokens: of one image, as asked for.
        config: pruning layers and budget of a method that drops in the decoder, else None.
    """

    modes = INFERENCE_MODES

    def __init__(
        self, model: nn.Module, method: type[DecoderBaseline | FeatureBaseline], average_tokens: float, **settings: Any
    ):
        self._inspect(model)
        self.pruners = Pruners({}, None)  # nothing to train
        self.average_tokens = average_tokens
        self.config = None
        self.method = method(self, average_tokens, **settings)
        if isinstance(self.method, DecoderBaseline):
            layers = self.method.layers
            self.config = PruneConfig(pruning_layers=layers, target_token_num=average_tokens, selection="topk")
            self.config.check_layers(self.num_layers)
            if self.vision_tokens is not None:
                self.method.counts(self.vision_tokens, average_tokens)
            self.scorers = {layer: self.method for layer in layers}

    def layer_budget(self, tokens: int, images: int) -> tuple[int, ...]:
        """Tokens that each pruning layer keeps of a sample with `tokens` vision tokens."""
        return self.method.counts(tokens, self.average_tokens * images)

    @property
    def watchers(self) -> dict[int, Callable[[LayerView], None]]:
        """The layer that the method watches."""
        watched = getattr(self.method, "watched", None)
        return {} if watched is None else {watched: self.method.watch}

    def __repr__(self) -> str:
        name, mode = type(self.method).__name__, self.state.mode
        return f"BaselineHandle(mode={mode!r}, method={name}, average_tokens={self.average_tokens})"

    def _attach(self) -> None:
        super()._attach()
        self._hooks += self.method.hooks(self)
        hf = compat.find_hf_llava(self.model) if compat.find_llava(self.model) is None else None
        if hf is not None and isinstance(self.method, FeatureBaseline):
            self._bind_shrinking(hf, Shrinking(hf, self.state, self.method.tokens, self.method.keep))

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state
        if state.reduction is not None and state.announced is not None:
            state.announced = state.reduction.describe(state.announced)
        state.reduction = None
        super()._begin(decoder, args, kwargs)
