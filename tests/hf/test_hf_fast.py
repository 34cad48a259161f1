"""Acceleration on Hugging Face's classes, without a GPU: the same code with calls in place of graphs."""

import copy

import pytest
import torch
from fast_law import FACTORS, assert_fast_is_plain
from law import matrix, settings, texts_and_images
from tiny_hf import KINDS, batch_of, generate, tiny
from transformers import DynamicCache

from llava_prune import accelerate, attach_pruners
from llava_prune.compat import find_decoder
from llava_prune.fast.suited import DecoderCheck


@torch.no_grad()
def test_a_cache_of_ones_own_is_refused_when_it_comes_back_empty():
    model = tiny("llava")
    inputs, cache = batch_of(model, [8], [1]), DynamicCache()
    with accelerate(model, emulate=True), pytest.raises(ValueError, match="go on with the one that was returned"):
        token = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        model(input_ids=token, past_key_values=cache, use_cache=True)


def test_sliding_windows_go_the_plain_way():
    model = tiny("llava")
    assert DecoderCheck(find_decoder(model).eval())(set()) is None
    find_decoder(model).config.sliding_window = 8
    find_decoder(model).config.layer_types = ["sliding_attention"]
    assert "sliding window of 8" in DecoderCheck(find_decoder(model))(set())


def test_what_is_bound_is_not_copied():
    model = tiny("llava")
    with accelerate(model, emulate=True), pytest.raises(ValueError, match="call remove"):
        copy.deepcopy(model)
    with attach_pruners(model, settings()), pytest.raises(ValueError, match="detach_pruners"):
        copy.deepcopy(model)
    copy.deepcopy(model)


@matrix({"kind": KINDS, **FACTORS})
def test_fast_is_plain(kind, batch, padding, images, selection, residual, first, how):
    model = tiny(kind)
    inputs = batch_of(model, *texts_and_images(batch, images), padding)
    config = settings(pruning_layers=(first, 3, 4), selection=selection, use_attn_residual=residual)
    assert_fast_is_plain(model, config, inputs, generate, how, padding == "right" and batch > 1)
