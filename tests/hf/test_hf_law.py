"""The law on Hugging Face's classes: masked and hard agree at every text position; keep-all is the stock model."""

from itertools import product

import pytest
import torch
from law import FACTORS, assert_the_law, covering, matrix, pairs, settings, texts_and_images, with_lora
from tiny_hf import IMAGE_TOKEN, KINDS, batch_of, generate, randomise_pruners, tiny

from llava_prune import attach_pruners, last_report, prune_mode

MATRIX = {"kind": KINDS, "merger": (False, True), **FACTORS}


def mergeable(kind, merger, *_):
    """The merger needs a fixed number of vision tokens an image."""
    return not merger or kind.startswith("llava")


@matrix(MATRIX, mergeable)
def test_the_law(kind, merger, attention, batch, padding, images, lora, residual, first):
    model = with_lora(tiny(kind, attention), lora)
    inputs = batch_of(model, *texts_and_images(batch, images), padding)
    layers = (first, 3, 4)
    config = settings(
        pruning_layers=layers, use_attn_residual=residual, enable_token_merger=merger, merger_tokens=9, merger_heads=4
    )
    assert_the_law(model, config, inputs, generate, images != "0")


def test_the_design_covers_every_pair_of_levels():
    cases = [case for case in product(*MATRIX.values()) if mergeable(*case)]
    few = covering(cases)
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, cases)) and len(few) < len(cases) / 50


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@torch.no_grad()
def test_a_prompt_that_ends_in_an_image_is_answered_from_its_last_token(selection):
    model = tiny()
    inputs = batch_of(model, [2, 2, 9], [1, 2, 1])  # in the first two no text follows the last image
    assert inputs["input_ids"][:2, -1].tolist() == [IMAGE_TOKEN] * 2
    randomise_pruners(attach_pruners(model, settings(selection=selection)), bias=-0.5)
    logits, answers = [], []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            logits.append(model(**inputs).logits[:, -1])
            report = last_report(model)
            answers.append(generate(model, inputs, {"max_new_tokens": 8, "do_sample": False}))
    assert all(kept[0][-1] == 15 and kept[1][-1] == 31 for kept in report.kept.values())
    assert report.tokens_per_layer[0, -1] < 16
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert torch.equal(*answers)
