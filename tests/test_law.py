"""The one law: masked and hard agree at every text position; keeping everything is the stock model, bit for bit."""

from itertools import product

import pytest
import torch
from law import FACTORS, assert_the_law, covering, matrix, pairs, settings, texts_and_images, with_lora
from tiny import IMAGE_TOKEN, batch_of, generate, randomise_pruners, tiny_llava

from llava_prune import attach_pruners, last_report, prune_mode

KINDS = {  # anyres and spatial_unpad is LLaVA-NeXT
    "square": {},
    "square-mistral": {"decoder": "mistral", "kv_heads": 2},
    "anyres": {"anyres": True},
    "unpad": {"anyres": True, "merge_type": "spatial_unpad"},
    "unpad-mistral": {"anyres": True, "merge_type": "spatial_unpad", "decoder": "mistral", "kv_heads": 2},
}
MATRIX = {"kind": tuple(KINDS), "merger": (False, True), **FACTORS}


def mergeable(kind, merger, *_):
    """The merger leaves no grid to unpad."""
    return not (merger and "unpad" in kind)


@matrix(MATRIX, mergeable)
def test_the_law(tower_folder, kind, merger, attention, batch, padding, images, lora, residual, first):
    side = "left" if padding == "left" else "right"
    model = with_lora(tiny_llava(tower_folder, attention=attention, padding_side=side, **KINDS[kind]), lora)
    inputs = batch_of(*texts_and_images(batch, images), padding, anyres="anyres" in KINDS[kind])
    layers = (first, 3, 4)
    config = settings(
        pruning_layers=layers, use_attn_residual=residual, enable_token_merger=merger, merger_tokens=9, merger_heads=4
    )
    assert_the_law(model, config, inputs, generate, images != "0")


def test_the_design_covers_every_pair_of_levels():
    cases = [case for case in product(*MATRIX.values()) if mergeable(*case)]
    few = covering(cases)
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, cases)) and len(few) < len(cases) / 50


@torch.no_grad()
def logits(model, mode, inputs):
    with prune_mode(model, mode):
        return model(**inputs).logits


def test_an_empty_question_is_pruned_all_the_same(llava):
    inputs = batch_of([2, 2, 9], [1, 1, 1])  # both text tokens stand before the image
    handle = attach_pruners(llava, settings(use_attn_residual=True))
    randomise_pruners(handle)
    masked, hard = logits(llava, "masked", inputs), logits(llava, "hard", inputs)
    assert handle.state.record.layout.question.sum(-1).tolist() == [0, 0, 7]
    assert (masked - hard)[handle.state.record.layout.text].abs().max() < 1e-4


@pytest.mark.parametrize("selection", ["threshold", "topk"])
def test_a_prompt_that_ends_in_an_image_is_answered_from_its_last_token(tower_folder, selection):
    model = tiny_llava(tower_folder, padding_side="left")
    inputs = batch_of([2, 2, 9], [1, 2, 1], "left")  # in the first two no text follows the last image
    assert inputs["input_ids"][:2, -1].tolist() == [IMAGE_TOKEN] * 2
    randomise_pruners(attach_pruners(model, settings(selection=selection)), bias=-0.5)
    masked, hard = logits(model, "masked", inputs), logits(model, "hard", inputs)
    report = last_report(model)
    assert all(kept[0][-1] == 15 and kept[1][-1] == 31 for kept in report.kept.values())
    assert report.tokens_per_layer[0, -1] < 16
    torch.testing.assert_close(masked[:, -1], hard[:, -1], atol=1e-4, rtol=0)
    answers = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            answers.append(generate(model, inputs, {"max_new_tokens": 8, "do_sample": False}))
    assert torch.equal(*answers)


def test_the_merger_fixes_the_tokens_of_an_image(llava):
    attach_pruners(llava, settings(enable_token_merger=True, merger_tokens=8, merger_heads=4))
    logits(llava, "hard", batch_of([9, 14, 7, 11], [1, 0, 2, 1]))
    assert last_report(llava).vision_tokens.tolist() == [8, 0, 16, 8]


def test_what_the_merger_was_told_and_did_not_use_merges_nothing_later(llava):
    """A decode step by hand that still passes images encodes none."""
    inputs = batch_of([9], [1])
    stock = llava(**inputs).logits
    attach_pruners(llava, settings(enable_token_merger=True, merger_tokens=8, merger_heads=4))
    with torch.no_grad(), prune_mode(llava, "hard"):
        cache = llava(**inputs, use_cache=True).past_key_values
        llava(input_ids=torch.tensor([[5]]), images=inputs["images"], past_key_values=cache, use_cache=True)
    assert torch.equal(logits(llava, "origin", inputs), stock)


def test_what_a_failed_call_left_is_not_taken_by_text_alone(llava):
    inputs = batch_of([9], [1])
    text = {"inputs": torch.arange(5, 30)[None] % 60, "max_new_tokens": 3, "do_sample": False}  # as long as the other
    stock = llava.generate(**text)
    randomise_pruners(attach_pruners(llava, settings()))
    for mode in ("origin", "hard"):
        with prune_mode(llava, mode):
            with pytest.raises(ValueError, match="bogus"):
                llava.generate(inputs["input_ids"], images=inputs["images"], bogus=1)
            assert torch.equal(llava.generate(**text), stock)


def test_min_and_max_keep_bound_every_pruning_layer(llava):
    randomise_pruners(attach_pruners(llava, settings(min_keep=3, max_keep=4, threshold=0.99)))
    logits(llava, "hard", batch_of([9, 14, 7, 11], [1, 1, 1, 1]))
    counts = last_report(llava).tokens_per_layer[:, 1:]
    assert counts.min() >= 3 and counts.max() <= 4
