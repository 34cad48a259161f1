"""The law on a GPU: half precision, SDPA and FlashAttention-2. Run with `pytest tests/gpu -m gpu`."""

import importlib.util

import pytest
import torch
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode

pytestmark = pytest.mark.gpu

CONFIG = PruneConfig(pruning_layers=(1, 3, 4), target_token_num=10, pruner_dim=16, pruner_heads=4)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def on_gpu(folder, attention, dtype, **values):
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    model = tiny_llava(folder, hidden=64, attention="sdpa" if dtype == torch.float32 else attention, **values)
    return model.to("cuda", dtype)


def cuda(batch, dtype):
    return {k: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", torch.float32),
        ("sdpa", torch.float16),
        ("sdpa", torch.bfloat16),
        ("flash_attention_2", torch.float16),
        ("flash_attention_2", torch.bfloat16),
    ],
)
def test_masked_equals_hard(tower_folder, attention, dtype, side):
    model = on_gpu(tower_folder, attention, dtype, padding_side=side)
    inputs = cuda(batch_of([9, 14, 7, 11], [1, 0, 2, 1], side), dtype)
    with torch.no_grad():
        stock = model(**inputs).logits
        handle = attach_pruners(model, CONFIG)
        for mode in ("origin", "masked", "hard"):
            with prune_mode(model, mode):
                kept_all = model(**inputs).logits
                assert torch.equal(kept_all[handle.state.record.layout.text], stock[handle.state.record.layout.text])
        randomise_pruners(handle)
        results, reports = {}, {}
        for mode in ("masked", "hard"):
            with prune_mode(model, mode):
                results[mode] = model(**inputs).logits.float()
                reports[mode] = last_report(model).tokens_per_layer
    text = handle.state.record.layout.text
    scale = results["masked"][text].abs().max()
    difference = (results["masked"] - results["hard"])[text].abs().max() / scale
    print(f"{attention} {dtype} {side}: relative difference {difference:.1e}, tokens {reports['hard'].tolist()}")
    assert torch.equal(reports["masked"], reports["hard"])
    assert difference < TOLERANCE[dtype]
    generated = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            generated.append(
                model.generate(
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    images=inputs["images"],
                    max_new_tokens=8,
                    do_sample=False,
                )
            )
    if dtype == torch.float32:
        assert torch.equal(*generated)


def test_soft_mode_on_flash_attention_is_refused(tower_folder):
    model = on_gpu(tower_folder, "flash_attention_2", torch.bfloat16)
    attach_pruners(model, CONFIG)
    with prune_mode(model, "soft"), pytest.raises(ValueError, match="sdpa"):
        model(**cuda(batch_of([9], [1]), torch.bfloat16))


def test_the_bias_of_the_first_pruner_has_a_gradient_under_fused_attention(tower_folder):
    """Query, key and value of a frozen base need none there, and the fused kernel then keeps nothing for the bias."""
    model = on_gpu(tower_folder, "sdpa", torch.float32).train().requires_grad_(False)
    handle = attach_pruners(model, CONFIG)
    handle.pruners.requires_grad_(True)
    with prune_mode(model, "soft"):
        model(**cuda(batch_of([9, 14], [1, 1], answers=[2, 2]), torch.float32)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in handle.pruners.named_parameters() if n.endswith("logits.weight"))
