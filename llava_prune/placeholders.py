"""Fewer placeholders for fewer features: Hugging Face's `input_ids` hold one for each vision token.

The outer model's `forward` and `generate` are bound; both take the processor's inputs as they are. What makes the
features fewer, a token merger or a baseline, is a hook on the projector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compat import bind_arguments
from .layout import IGNORE_INDEX
from .state import PruneState


@dataclass(frozen=True)
class Shrunk:
    """A batch with fewer placeholders; rows are packed to the right.

    Attributes:
        ids: (B, W) the new `input_ids`.
        index: (B, W) long, old position of each new one.
        valid: (B, W) bool, False at filler, which only a batch with unequal numbers of images has.
    """

    ids: Tensor
    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, ids: Tensor, image_token: int, tokens: int, keep: int) -> Shrunk:
        """Keep the first `keep` placeholders of each run of `tokens`."""
        image = ids == image_token
        present = ~image | ((image.cumsum(-1) - 1) % tokens < keep)
        width = int(present.sum(-1).max())
        order = torch.sort(present.to(torch.uint8), dim=-1, stable=True).indices[:, -width:]
        valid = present.gather(1, order)
        filler = 0 if image_token else 1  # any token but a placeholder
        return cls(ids.gather(1, order).masked_fill(~valid, filler), order, valid)

    def apply(self, call: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `forward` or `generate`, shrunk."""
        mask = call.get("attention_mask")
        if mask is None and not bool(self.valid.all()):
            mask = torch.ones_like(call["input_ids"])
        shrunk = {**call, "input_ids": self.ids}
        if mask is not None:
            shrunk["attention_mask"] = mask.gather(1, self.index) * self.valid.to(mask.dtype)
        if call.get("labels") is not None:
            shrunk["labels"] = call["labels"].gather(1, self.index).masked_fill(~self.valid, IGNORE_INDEX)
        for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
            shrunk.pop(name, None)  # of the longer sequence; the model makes its own
        return shrunk


@dataclass(frozen=True)
class Shrinking:
    """When and by how much the inputs of a model shrink.

    Attributes:
        model: the outer model.
        state: tells the mode.
        tokens, keep: features of an image before and after.
        announce: is shown the shrunk inputs before images are encoded, or None.
    """

    model: nn.Module
    state: PruneState
    tokens: int
    keep: int
    announce: Callable[[dict[str, Any]], None] | None = None

    def __call__(self, call: dict[str, Any]) -> tuple[Shrunk, dict[str, Any]] | None:
        """The batch and the inputs with fewer placeholders, or None where nothing shrinks."""
        ids = call.get("input_ids")
        if self.state.mode == "origin" or self.keep == self.tokens or call.get("pixel_values") is None or ids is None:
            return None
        shrunk = Shrunk.of(ids, self.model.config.image_token_id, self.tokens, self.keep)
        inputs = shrunk.apply(call)
        if self.announce is not None:
            self.announce(inputs)
        return shrunk, inputs


def shrinking_forward(original: Callable, shrinking: Shrinking) -> Callable:
    """The model's `forward`; logits have the length they were asked for, zero at placeholders that are gone.

    The key-value cache it returns holds the shorter sequence: go on with `generate`.
    """
    bind = bind_arguments(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = bind(args, kwargs)
        smaller = None if shrinking.state.inside_generate else shrinking(call)
        if smaller is None:
            return original(*args, **kwargs)
        shrunk, inputs = smaller
        output = original(**{**inputs, "return_dict": True})
        if output.logits.shape[1] == shrunk.index.shape[1]:
            full = output.logits.new_zeros(*call["input_ids"].shape, output.logits.shape[-1])
            index = shrunk.index[..., None].expand_as(output.logits)
            output.logits = full.scatter(1, index, output.logits * shrunk.valid[..., None])
        return output.to_tuple() if call.get("return_dict") is False else output

    return forward


def _whole_lengths(inputs: dict[str, Any], config: Any) -> dict[str, int]:
    """Limits of a generation that count the prompt, by name, from the keywords or else the configuration.

    Where new tokens are limited that limit counts; the host's defaults count no prompt.
    """
    found = {}
    for whole, new, default in (("max_length", "max_new_tokens", 20), ("min_length", "min_new_tokens", 0)):
        value = inputs.get(whole)
        if value is None and inputs.get(new) is None and getattr(config, new, None) is None:
            value = getattr(config, whole, None)
            value = None if value == default else value
        if value is not None:
            found[whole] = value
    return found


def shrinking_generate(original: Callable, shrinking: Shrinking) -> Callable:
    """The model's `generate`, whose output starts with the prompt as it was given."""

    bind = bind_arguments(original)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = bind(args, kwargs)
        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        smaller = shrinking(call)
        if smaller is None:
            return original(*args, **kwargs)
        shrunk, inputs = smaller
        left_out = call["input_ids"].shape[1] - shrunk.index.shape[1]
        config = inputs.get("generation_config") or shrinking.model.generation_config
        inputs |= {name: value - left_out for name, value in _whole_lengths(inputs, config).items()}
        shrinking.state.inside_generate = True
        try:
            output = original(**inputs)
        finally:
            shrinking.state.inside_generate = False
        plain = isinstance(output, Tensor)
        sequences = output if plain else output.sequences
        ids = call["input_ids"]
        prompt = ids.repeat_interleave(len(sequences) // len(ids), 0)
        sequences = torch.cat([prompt, sequences[:, shrunk.index.shape[1] :]], -1)
        if plain:
            return sequences
        output.sequences = sequences
        return output

    return generate
