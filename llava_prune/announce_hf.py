"""Telling the decoder what its input is made of: Hugging Face's LLaVA classes.

Their `input_ids` hold one placeholder for each vision token, so the layout can be read off them. The outer model's
`forward` is bound, not hooked: PEFT calls `forward` itself and passes hooks by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compat import bind_arguments
from .layout import IGNORE_INDEX, TokenLayout, question_of
from .merger import mean_question
from .state import PruneState


def announcing_forward(
    original: Callable, model: nn.Module, state: PruneState, tokens_per_image: int | None
) -> Callable:
    """The model's `forward`, with its signature, that fills `state.announced` first.

    Args:
        original: the forward before binding.
        model: the Hugging Face model, for its image token and whether it trains.
        state: receives the layout of every call with an image (and of every call in training), else None.
        tokens_per_image: vision tokens of one image, None where that depends on the image.
    """
    bind = bind_arguments(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = bind(args, kwargs)
        state.announced = None
        if state.mode != "origin":
            _refuse(call)
        has_image = _given(call, "pixel_values", "image")
        if has_image or model.training:
            state.announced = _layout(call, model.config.image_token_id, has_image, state.mode, tokens_per_image)
        if state.loss_only and call.get("labels") is not None:
            return original(**_with_supervised_logits(call))
        return original(*args, **kwargs)

    return forward


def refusing_pieces(original: Callable, state: PruneState) -> Callable:
    """The host's `_prefill`, of which `generate` can ask to give the model one piece of the prompt after another."""
    bind = bind_arguments(original)

    @functools.wraps(original)
    def prefill(*args: Any, **kwargs: Any) -> Any:
        call = bind(args, kwargs)
        size, length = call["generation_config"].prefill_chunk_size, call["input_ids"].shape[1]
        has_image = _given(call["model_kwargs"], "pixel_values", "image")
        if state.mode != "origin" and has_image and size is not None and size < length:
            raise ValueError(
                f"prefill_chunk_size {size} cuts the prompt of {length} positions into pieces, and what is kept of an "
                "image depends on all of it: leave prefill_chunk_size unset, or generate in "
                "prune_mode(model, 'origin')"
            )
        return original(*args, **kwargs)

    return prefill


def requiring_outer(model: nn.Module, state: PruneState) -> Callable:
    """A forward pre-hook for the inner model, whose images nothing announces unless the outer one calls it."""
    bind = bind_arguments(model.model.forward)

    def check(_inner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if state.mode != "origin" and state.announced is None and _given(bind(args, kwargs), "pixel_values", "image"):
            raise ValueError(
                f"{type(model.model).__name__} was called by itself, which prunes nothing: call the "
                f"{type(model).__name__} around it (output_hidden_states=True gives hidden states), or run in "
                "prune_mode(model, 'origin')"
            )

    return check


def _with_supervised_logits(call: dict[str, Any]) -> dict[str, Any]:
    """The same loss from the logits behind the first answer's start alone: those of the image are most of them."""
    supervised = (call["labels"] != IGNORE_INDEX).any(0)
    count = int((supervised.cumsum(-1) > 0).sum()) + 1  # and the position that the first is predicted from
    count = min(max(count, 2), call["labels"].shape[1])
    return {**call, "labels": call["labels"][:, -count:], "logits_to_keep": count}


def announcing_questions(model: nn.Module, state: PruneState, tokens: int) -> Callable[[dict[str, Any]], None]:
    """Tells the token merger the question of each image, from inputs with `tokens` placeholders an image."""

    def announce(call: dict[str, Any]) -> None:
        ids, mask = call["input_ids"], call.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        is_image = ids == model.config.image_token_id  # also a masked one, which is encoded like the others
        means = mean_question(model.get_input_embeddings(), ids, question_of(valid, is_image, call.get("labels")))
        state.merger_questions = means.repeat_interleave(is_image.sum(-1) // tokens, 0)

    return announce


def _layout(
    call: dict[str, Any], image_token: int, has_image: bool, mode: str, tokens_per_image: int | None
) -> TokenLayout | None:
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if ids is None or not (mask is None or isinstance(mask, Tensor) and mask.dim() == 2):
        if mode == "origin":
            return None
        raise ValueError(
            "pruning finds the vision tokens by input_ids and a (batch, length) attention_mask (or None): pass those, "
            "and leave cache_implementation unset (a static cache makes masks of four dimensions)"
        )
    is_image = (ids == image_token) & has_image
    # a cache in use makes the mask longer than the ids; the decoder refuses an image there
    valid = ids.new_ones(ids.shape).bool() if mask is None else mask[:, -ids.shape[1] :].bool()
    vision = is_image & valid
    labels = call.get("labels")
    if labels is not None and mode == "hard" and bool((vision & (labels != IGNORE_INDEX)).any()):
        raise ValueError(
            "labels supervise image placeholders, of which hard mode removes some: set labels to -100 where input_ids "
            f"is the image token {image_token}"
        )
    if tokens_per_image is not None:
        num_images = (vision.sum(-1) + tokens_per_image - 1) // tokens_per_image
    else:  # anyres: runs of placeholders, of which processors put text between two
        num_images = (vision & ~_shifted(vision)).sum(-1)
    return TokenLayout.build(valid, vision, num_images, labels)


def _shifted(mask: Tensor) -> Tensor:
    """(B, T) each entry's left neighbour, False at the start."""
    return mask.roll(1, -1).index_fill(-1, mask.new_zeros(1).long(), False)


def _given(call: dict[str, Any], pixels: str, kind: str) -> bool:
    """Whether the call brings images (videos); `generate` of 5.x encodes them first."""
    return call.get(pixels) is not None or (call.get("mm_encoder_outputs") or {}).get(kind) is not None


def _refuse(call: dict[str, Any]) -> None:
    if _given(call, "pixel_values_videos", "video"):
        raise ValueError("videos are not pruned: run them in prune_mode(model, 'origin')")
    if call.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds do not say where the vision tokens are: pass input_ids and pixel_values, or run in "
            "prune_mode(model, 'origin')"
        )
