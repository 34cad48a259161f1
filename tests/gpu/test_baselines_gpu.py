"""Every baseline on a GPU: SDPA and FlashAttention-2 in half precision, on the stack that is installed."""

import importlib.util

import pytest
import torch
from same import TOLERANCE

from llava_prune import last_report, prune_mode
from llava_prune.baselines import METHODS, attach_baseline

pytestmark = pytest.mark.gpu

AVERAGE = 12  # of the 16 tokens that the tiny models have
LENGTHS, IMAGES = [9, 14, 7, 11], [1, 0, 2, 1]


def model_and_inputs(folder, attention, dtype):
    if importlib.util.find_spec("llava") is not None:
        from tiny import batch_of, tiny_llava

        model = tiny_llava(folder, hidden=64, attention=attention)
        inputs = batch_of(LENGTHS, IMAGES, "right")
    else:
        from tiny_hf import batch_of, tiny

        model = tiny("llava", hidden=64)
        model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        inputs = batch_of(model, LENGTHS, IMAGES, "right")
    model.to("cuda", dtype)
    return model, {k: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@torch.no_grad()
def test_masked_equals_hard(tower_folder, attention, name):
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    model, inputs = model_and_inputs(tower_folder, attention, torch.bfloat16)
    handle = attach_baseline(model, name, average_tokens=AVERAGE)
    logits, reports = {}, {}
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            logits[mode] = model(**inputs).logits.float()
            reports[mode] = last_report(model)
    text = handle.state.record.layout.text
    if hasattr(model.config, "image_token_id"):  # fewer placeholders before the decoder, logits at their old places
        text = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
    difference = (logits["masked"] - logits["hard"])[text].abs().max() / logits["masked"][text].abs().max()
    average = reports["hard"].average_tokens
    print(f"{name} {attention}: relative difference {difference:.1e}, average tokens {average.tolist()}")
    images = torch.tensor(IMAGES, device=average.device)
    assert torch.equal(reports["masked"].tokens_per_layer, reports["hard"].tokens_per_layer)
    assert (average <= AVERAGE * images).all() and (average[images > 0] >= AVERAGE / 2).all()
    assert difference < TOLERANCE[torch.bfloat16]
