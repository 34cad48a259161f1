"""The law on a GPU, hf stack: half precision, FlashAttention-2, quantised bases: `pytest tests/gpu -m gpu`."""

import importlib.util
import shutil

import pytest
import torch
from same import assert_keep_all_is_stock, assert_masked_equals_hard
from tiny_hf import batch_of, randomise_pruners, tiny

from llava_prune import PruneConfig, attach_pruners, prune_mode
from llava_prune.testbed.install import install_base

pytestmark = pytest.mark.gpu

SETTINGS = {"pruning_layers": (1, 3, 4), "target_sparsity": 0.5, "pruner_dim": 16, "pruner_heads": 4}
LENGTHS, IMAGES = [9, 14, 7, 11], [1, 0, 2, 1]


def tiny_with(kind, attention):
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    model = tiny(kind, hidden=64)
    # the tiny towers' heads are narrower than FlashAttention takes
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    return model


def cuda(model, batch, dtype):
    """Both on the GPU; the batch was made with the model on the CPU, which counts its vision tokens."""
    model.to("cuda", dtype)
    return {k: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


@pytest.mark.parametrize("kind", ["llava", "next-mistral", "onevision"])
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
def test_masked_equals_hard(kind, attention, dtype, side):
    model = tiny_with(kind, attention)
    inputs = cuda(model, batch_of(model, LENGTHS, IMAGES, side), dtype)
    with torch.no_grad():
        stock = model(**inputs).logits
        handle = attach_pruners(model, PruneConfig(**SETTINGS))
        assert_keep_all_is_stock(model, handle, inputs, stock)
        randomise_pruners(handle)
        assert_masked_equals_hard(model, handle, inputs, dtype, f"{kind} {attention} {side}")
    generated = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            generated.append(model.generate(**inputs, max_new_tokens=32, do_sample=False))
    if dtype == torch.float32:
        assert torch.equal(*generated)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_layers_on_two_gpus():
    """As `device_map="auto"` spreads them: the rotary tables of all layers are made on the last one's device."""
    from accelerate import dispatch_model

    model = tiny("llava")
    inputs = cuda(model, batch_of(model, LENGTHS, IMAGES, "left"), torch.float32)
    with attach_pruners(model, PruneConfig(**SETTINGS)) as handle:
        randomise_pruners(handle)
        weights = handle.pruners.state_dict()
        expected = generated(model, inputs)
    parts = {"embed_tokens": 0, "norm": 1, "rotary_emb": 1} | {f"layers.{index}": int(index > 2) for index in range(6)}
    device_map = {f"model.language_model.{part}": device for part, device in parts.items()}
    device_map |= {"model.vision_tower": 0, "model.multi_modal_projector": 0, "lm_head": 1}
    dispatch_model(model, device_map)
    with attach_pruners(model, PruneConfig(**SETTINGS)) as handle:
        handle.pruners.load_state_dict(weights)
        assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), expected, strict=True))


def generated(model, inputs):
    """Greedy answers in masked and in hard mode, on the CPU."""
    answers = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode):
            answers.append(model.generate(**inputs, max_new_tokens=16, do_sample=False).cpu())
    return answers


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The shipped base in Hugging Face's format."""
    from llava_prune.convert import main

    folder = tmp_path_factory.mktemp("converted")
    main(["--model", str(install_base(folder)), "--out", str(folder / "hf")])
    yield folder / "hf"
    shutil.rmtree(folder)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_with_bf16_pruners(converted, bits, attention):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        converted,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_type="nf4",
        ),
        attn_implementation={"text_config": attention, "vision_config": "sdpa"},
        device_map={"": 0},
    ).eval()
    text = torch.randint(3, 500, (4, 12), generator=torch.Generator().manual_seed(0))
    image = torch.full((4, 144), model.config.image_token_id)
    ids = torch.cat([text[:, :2], image, text[:, 2:]], 1).cuda()
    pixels = torch.randn(4, 3, 192, 192, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, :1] = 0
    with torch.no_grad():
        stock = model(**inputs).logits
        handle = attach_pruners(model, PruneConfig(**{**SETTINGS, "pruning_layers": (1, 3, 5)}))
        assert {p.dtype for p in handle.pruners.parameters()} == {torch.bfloat16}
        assert_keep_all_is_stock(model, handle, inputs, stock)
        randomise_pruners(handle)
        assert_masked_equals_hard(model, handle, inputs, torch.bfloat16, f"{bits} bits {attention}")


def test_soft_mode_on_flash_attention_is_refused():
    model = tiny_with("llava", "flash_attention_2")
    attach_pruners(model, PruneConfig(**SETTINGS))
    with prune_mode(model, "soft"), pytest.raises(ValueError, match="sdpa"):
        model(**cuda(model, batch_of(model, [9], [1]), torch.bfloat16))
