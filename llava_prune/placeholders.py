"""Fewer placeholders for fewer features: Hugging Face's `input_ids` hold one for each vision token.

The outer model's `forward` and `generate` are bound; both take the processor's inputs as they are. What makes the
features fewer, a token merger or a baseline, is a hook on the projector. A key-value cache knows what it began with:
the call that goes on with it has no image, and may be in another mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compat import bind_arguments
from .compat_cache import cache_length, cache_of
from .layout import IGNORE_INDEX
from .state import PruneState

_SHRUNK = "llava_prune_shrunk"  # attribute of a key-value cache


@dataclass(frozen=True)
class Shrunk:
    """A batch with fewer placeholders; rows are packed to the right.

    Attributes:
        ids: (B, W) the new `input_ids`.
        index: (B, W) long, old position of each new one.
        valid: (B, W) bool, False at filler, which only a batch with unequal numbers of images has.
        length: T, positions there were before.
    """

    ids: Tensor
    index: Tensor
    valid: Tensor
    length: int

    @classmethod
    def of(cls, ids: Tensor, image_token: int, tokens: int, keep: int) -> Shrunk:
        """Keep the first `keep` placeholders of each run of `tokens`."""
        image = ids == image_token
        present = ~image | ((image.cumsum(-1) - 1) % tokens < keep)
        width = int(present.sum(-1).max())
        order = torch.sort(present.to(torch.uint8), dim=-1, stable=True).indices[:, -width:]
        valid = present.gather(1, order)
        filler = 0 if image_token else 1  # any token but a placeholder
        return cls(ids.gather(1, order).masked_fill(~valid, filler), order, valid, ids.shape[1])

    @property
    def left_out(self) -> int:
        """Positions that are gone."""
        return self.length - self.index.shape[1]

    def copied(self, rows: int) -> Shrunk:
        """So many rows, the copies of a sample side by side, as beam search returns them."""
        copies = rows // len(self.ids)
        return Shrunk(*(x.repeat_interleave(copies, 0) for x in (self.ids, self.index, self.valid)), self.length)

    def begins(self, ids: Tensor) -> bool:
        """Whether (B * copies, at least T) `input_ids` begin with what was there before."""
        if ids.shape[1] < self.length or len(ids) % len(self.ids):
            return False
        own = self.copied(len(ids))
        return bool((ids.gather(1, own.index) == own.ids)[own.valid].all())

    def of_mask(self, mask: Tensor) -> Tensor:
        """The attention mask of what is left, and of what follows."""
        left = mask.gather(1, self.index) * self.valid.to(mask.dtype)
        return torch.cat([left, mask[:, self.length :]], 1)

    def apply(self, call: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `forward` or `generate`, shrunk; more text may follow in them."""
        mask = call.get("attention_mask")
        if mask is None and not bool(self.valid.all()):
            mask = torch.ones_like(call["input_ids"])
        shrunk = {**call, "input_ids": torch.cat([self.ids, call["input_ids"][:, self.length :]], 1)}
        if mask is not None:
            shrunk["attention_mask"] = self.of_mask(mask)
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


def _begun_with(call: dict[str, Any]) -> Shrunk | None:
    """What the cache of a call began with, or None where nothing in it was shrunk.

    Raises:
        ValueError: an image is given with such a cache.
    """
    cache = cache_of(call)
    shrunk = getattr(cache, _SHRUNK, None)
    if shrunk is None:
        return None
    if not cache_length(cache, 0):  # it was emptied for another prompt
        _mark(cache, None)
        return None
    if call.get("pixel_values") is not None:
        raise ValueError(
            "an image was given with a key-value cache that is in use: leave pixel_values out to go on with text, or "
            "prefill the whole prompt again"
        )
    return shrunk


def _mark(cache: Any, shrunk: Shrunk | None) -> None:
    if cache is not None:
        setattr(cache, _SHRUNK, shrunk)


def _with_shorter_mask(call: dict[str, Any], begun: Shrunk) -> dict[str, Any]:
    """A call of new tokens alone, whose attention mask counts the prompt as it was, or else as its cache holds it.

    Raises:
        ValueError: it counts neither, or there are `position_ids`, which count nobody knows what.
    """
    mask = call.get("attention_mask")
    new = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    held = cache_length(cache_of(call), 0) + new.shape[1]
    whole = held + begun.left_out
    if mask is None or mask.dim() != 2 or mask.shape[1] == held < whole:
        return call
    if mask.shape[1] != whole or len(mask) % len(begun.ids):
        raise ValueError(
            f"the attention_mask is {tuple(mask.shape)}, and the key-value cache of {len(begun.ids)} prompts lacks "
            f"{begun.left_out} of their placeholders: give it {whole} positions, or {held} without those"
        )
    if call.get("position_ids") is not None:
        raise ValueError(
            "position_ids beside the attention_mask of a prompt, of which the key-value cache lacks placeholders: "
            f"leave position_ids out, or give both as the cache counts, the mask with {held} positions"
        )
    return {**call, "attention_mask": begun.copied(len(mask)).of_mask(mask)}


def shrinking_forward(original: Callable, shrinking: Shrinking) -> Callable:
    """The model's `forward`; logits have the length they were asked for, zero at placeholders that are gone.

    The key-value cache it returns holds the shorter sequence. Go on with `generate` on all the `input_ids`, or with
    `forward` on the new ones; the attention mask may count what is gone.
    """
    bind = bind_arguments(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if shrinking.state.generating is not None:
            output = original(*args, **kwargs)
            _mark(output.past_key_values, shrinking.state.generating)
            return output
        call = bind(args, kwargs)
        begun = _begun_with(call)
        if begun is not None:
            return original(**_with_shorter_mask(call, begun))
        smaller = shrinking(call)
        if smaller is None:
            return original(*args, **kwargs)
        shrunk, inputs = smaller
        output = original(**{**inputs, "return_dict": True})
        _mark(output.past_key_values, shrunk)
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


def _are_new_alone(call: dict[str, Any]) -> bool:
    """Whether `generate` is given the new tokens of a chat and not all of it; the host reads it off the mask too."""
    mask, ids = call.get("attention_mask"), call.get("input_ids")
    return ids is None or mask is not None and mask.shape[1] != ids.shape[1]


def _whole(call: dict[str, Any], begun: Shrunk) -> tuple[Shrunk, dict[str, Any]]:
    """A chat and the inputs of its call, shrunk as its beginning was.

    Raises:
        ValueError: it begins otherwise.
    """
    ids = call["input_ids"]
    if not begun.begins(ids):
        raise ValueError(
            f"these input_ids do not begin with the {begun.length} of each sample that the key-value cache was filled "
            "from, padding included: give them with the new ones behind, or prefill the whole prompt again"
        )
    return begun, begun.copied(len(ids)).apply(call)


def shrinking_generate(original: Callable, shrinking: Shrinking) -> Callable:
    """The model's `generate`, whose output starts with the prompt as it was given."""

    bind, state = bind_arguments(original), shrinking.state

    def run(inputs: dict[str, Any], shrunk: Shrunk) -> Any:
        state.generating = shrunk
        try:
            return original(**inputs)
        finally:
            state.generating = None

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        call = bind(args, kwargs)
        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        begun = _begun_with(call)
        if begun is not None and _are_new_alone(call):
            return run(_with_shorter_mask(call, begun), begun)
        smaller = shrinking(call) if begun is None else _whole(call, begun)
        if smaller is None:
            return original(*args, **kwargs)
        shrunk, inputs = smaller
        config = inputs.get("generation_config") or shrinking.model.generation_config
        inputs |= {name: value - shrunk.left_out for name, value in _whole_lengths(inputs, config).items()}
        output = run(inputs, shrunk)
        plain = isinstance(output, Tensor)
        sequences = output if plain else output.sequences
        ids = call["input_ids"]
        prompt = ids.repeat_interleave(len(sequences) // len(ids), 0)
        sequences = torch.cat([prompt, sequences[:, inputs["input_ids"].shape[1] :]], -1)
        if plain:
            return sequences
        output.sequences = sequences
        return output

    return generate
