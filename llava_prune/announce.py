"""Telling the decoder what its input is made of: LLaVA's own input preparation, observed on the instance.

`prepare_inputs_labels_for_multimodal` says nothing of where the vision tokens go. Labels that number the text tokens
come back with IGNORE_INDEX at vision tokens and with each text token's number at its new place: one call, right for
any number of images, any resolution, truncation and both padding sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from .compat import IMAGE_TOKEN_INDEX
from .layout import IGNORE_INDEX, TokenLayout, question_of
from .merger import TokenMerger, mean_question
from .state import PruneState


def announcing_prepare(
    original: Callable, model: nn.Module, state: PruneState, merger: TokenMerger | None
) -> Callable:
    """The bound `prepare_inputs_labels_for_multimodal` that also fills `state.announced`.

    Args:
        original: the method before binding.
        model: the LLaVA model, for its embeddings.
        state: receives the layout, and the merger's question vectors.
        merger: the token merger, or None.
    """

    def prepare(
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Any,
        image_sizes: Any = None,
    ) -> tuple:
        if images is None:  # text only, or a decode step of generate
            state.announced = None
            return original(input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes)
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        given = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        if merger is not None and state.mode != "origin":
            state.merger_questions = _question_vectors(model, input_ids, given.bool(), labels, images)
        ids, positions, mask, cache, embeds, numbered = original(
            input_ids, position_ids, given, past_key_values, numbers, images, image_sizes
        )
        if embeds is None:  # a single token: a decode step, in which nothing was encoded
            state.announced = state.merger_questions = None
            return ids, positions, attention_mask, cache, None, labels
        valid = mask.bool()
        vision = valid & (numbered == IGNORE_INDEX)
        if labels is not None:
            labels = labels.gather(1, numbered.clamp(min=0)).masked_fill(numbered == IGNORE_INDEX, IGNORE_INDEX)
        num_images = ((input_ids == IMAGE_TOKEN_INDEX) & given.bool()).sum(-1)
        layout = TokenLayout.build(valid, vision, num_images, labels)
        state.announced = state.prepared = replace(layout, embeds=TensorWeakRef(embeds))
        return ids, positions, None if attention_mask is None else mask, cache, embeds, labels

    return prepare


def forgetting_generate(original: Callable, state: PruneState) -> Callable:
    """The bound `generate`, which does not prepare text alone: what a failed call left must not be taken for it."""

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        state.announced = None
        return original(*args, **kwargs)

    return generate


def refusing_contrastive_search(original: Callable, state: PruneState) -> Callable:
    """The host's `contrastive_search`, which `generate` calls between preparing an image and the prefill."""

    @functools.wraps(original)
    def contrastive_search(*args: Any, **kwargs: Any) -> Any:
        layout = state.layout_of(kwargs.get("inputs_embeds"))
        if state.mode != "origin" and layout is not None and layout.has_vision:
            raise ValueError(
                "contrastive search (penalty_alpha) compares the hidden states of all tokens, and those of removed "
                "ones are gone: generate without penalty_alpha, or in prune_mode(model, 'origin')"
            )
        return original(*args, **kwargs)

    return contrastive_search


def _question_vectors(
    model: nn.Module, input_ids: Tensor, valid: Tensor, labels: Tensor | None, images: Any
) -> Tensor:
    """(crops, D) mean embedding of the question that each image crop belongs to, before the image is inserted."""
    is_image = (input_ids == IMAGE_TOKEN_INDEX) & valid
    mean = mean_question(model.get_input_embeddings(), input_ids, question_of(valid, is_image, labels))
    # LLaVA takes one image for a sample without any, to keep the batch in step
    per_image = mean.repeat_interleave(is_image.sum(-1).clamp(min=1), 0)
    if isinstance(images, list) or images.ndim == 5:
        crops = torch.tensor([1 if x.ndim == 3 else x.shape[0] for x in images], device=mean.device)
        return per_image.repeat_interleave(crops, 0)
    return per_image


def merging_hook(state: PruneState, merger: TokenMerger) -> Callable:
    """A forward pre-hook for the projector that merges its input in every mode but origin."""

    def merge(_projector: nn.Module, args: tuple) -> tuple | None:
        questions, state.merger_questions = state.merger_questions, None
        if questions is None or state.mode == "origin":  # what an interrupted call left
            return None
        # beam search of transformers up to 5.17 encodes the images of every beam
        questions = questions.repeat_interleave(len(args[0]) // len(questions), 0)
        return (merger(args[0], questions.to(args[0].device)), *args[1:])

    return merge
