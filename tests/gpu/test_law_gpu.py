"""The law on a GPU, llava stack: half precision, FlashAttention-2, quantised bases: `pytest tests/gpu -m gpu`."""

import importlib.util

import pytest
import torch
from same import assert_keep_all_is_stock, assert_masked_equals_hard
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, prune_mode

pytestmark = pytest.mark.gpu

CONFIG = PruneConfig(pruning_layers=(1, 3, 4), target_token_num=10, pruner_dim=16, pruner_heads=4)
BASE_CONFIG = PruneConfig(pruning_layers=(1, 3, 5), target_token_num=41, pruner_dim=64, pruner_heads=4)


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
        assert_keep_all_is_stock(model, handle, inputs, stock)
        randomise_pruners(handle)
        assert_masked_equals_hard(model, handle, inputs, dtype, f"{attention} {side}")
    generated = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            generated.append(
                model.generate(
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    images=inputs["images"],
                    max_new_tokens=32,
                    do_sample=False,
                )
            )
    if dtype == torch.float32:
        assert torch.equal(*generated)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_with_bf16_pruners(tmp_path, bits, attention):
    pytest.importorskip("bitsandbytes")
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers import BitsAndBytesConfig

    from llava_prune.testbed.install import install_base

    quantisation = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "mm_projector"],
    )
    model = LlavaLlamaForCausalLM.from_pretrained(
        install_base(tmp_path),
        torch_dtype=torch.bfloat16,
        quantization_config=quantisation,
        attn_implementation=attention,
        device_map={"": 0},
    ).eval()
    model.get_vision_tower().load_model()
    model.get_vision_tower().to("cuda", torch.bfloat16)
    inputs = cuda(batch_of([9, 14, 7, 11], [1, 0, 2, 1], image=192, vocab=500), torch.bfloat16)
    with torch.no_grad():
        stock = model(**inputs).logits
        handle = attach_pruners(model, BASE_CONFIG)
        assert {p.dtype for p in handle.pruners.parameters()} == {torch.bfloat16}
        assert_keep_all_is_stock(model, handle, inputs, stock)
        randomise_pruners(handle)
        assert_masked_equals_hard(model, handle, inputs, torch.bfloat16, f"{bits} bits {attention}")


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
