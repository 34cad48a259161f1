"""Real CUDA graphs: replays give what the plain path gives, on the stack that is installed."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from law import randomise_pruners, settings
from same import TOLERANCE, assert_decided_alike

from llava_prune import accelerate, attach_pruners, last_report, prune_mode
from llava_prune.baselines import METHODS, attach_baseline
from llava_prune.bench.decisions import keeping, share_otherwise

pytestmark = pytest.mark.gpu

LLAVA = importlib.util.find_spec("llava") is not None
NEW_TOKENS = 64


def model_and_inputs(folder, dtype, lengths=(9, 14, 7, 11), images=(1, 0, 2, 1), attention="sdpa"):
    if LLAVA:
        from tiny import batch_of, tiny_llava

        model = tiny_llava(folder, hidden=64, attention=attention, padding_side="left")
        inputs = batch_of(list(lengths), list(images), "left")
    else:
        from tiny_hf import batch_of, tiny

        model = tiny("llava", hidden=64)
        model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        inputs = batch_of(model, list(lengths), list(images), "left")
    model.to("cuda", dtype)
    return model, {k: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def answer(model, inputs):
    arguments = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if LLAVA:
        from tiny import generate

        return generate(model, inputs, arguments)
    return model.generate(**inputs, **arguments)


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_graphs_are_the_plain_path(tower_folder, dtype, selection, batch, fuse):
    model, inputs = model_and_inputs(tower_folder, dtype, (9, 14, 7, 11)[:batch], (1, 0, 2, 1)[:batch])
    handle = attach_pruners(model, settings(selection=selection, use_attn_residual=True))
    randomise_pruners(handle)
    for mode in ("origin", "hard"):
        with prune_mode(model, mode):
            tokens, plain = answer(model, inputs), handle.state.record
            counts, found, kept = last_report(model).tokens_per_layer, [], []
            with accelerate(model, room=16, bucket=4, fuse=fuse) as fast:
                for turn in range(3):
                    found.append(model(**inputs).logits.float())
                    kept.append(handle.state.record.kept)
                    again = answer(model, inputs)
                    if dtype == torch.float32:
                        assert torch.equal(again, tokens), (mode, turn)
                        assert torch.equal(last_report(model).tokens_per_layer, counts)
                assert len(fast.graphs) > 0 and fast.graphs.cuda
            assert_decided_alike(plain, handle.state.record, dtype)
            for logits, decided in zip(found, kept, strict=True):
                # a token on the edge changes the logits
                with keeping(handle, decided) if mode == "hard" else nullcontext():
                    expected = model(**inputs).logits.float()
                text = handle.state.record.layout.text
                difference = (logits - expected)[text].abs().max() / expected[text].abs().max()
                assert difference < TOLERANCE[dtype], (mode, difference)
            same = (again == tokens).float().mean().item()
            otherwise = share_otherwise(kept[-1], plain.kept)
            label = f"{mode} {dtype} {selection} batch {batch} fuse {fuse}"
            print(f"{label}: difference {difference:.1e}, kept otherwise {otherwise:.1%}, same tokens {same:.3f}")


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_baselines_run_in_graphs(tower_folder, name):
    model, inputs = model_and_inputs(tower_folder, torch.float32)
    with attach_baseline(model, name, average_tokens=12):
        expected = answer(model, inputs)
        with accelerate(model, room=16, bucket=4) as fast:
            for _ in range(2):
                assert torch.equal(answer(model, inputs), expected)
            assert len(fast.graphs) > 0


@torch.no_grad()
def test_many_shapes_in_bounded_memory(tower_folder):
    model, _ = model_and_inputs(tower_folder, torch.bfloat16)
    randomise_pruners(attach_pruners(model, settings(selection="topk")))
    with prune_mode(model, "hard"), accelerate(model, room=16, bucket=4, max_graphs=12) as fast:
        used = []
        for _ in range(3):
            for length in range(6, 30, 3):
                inputs = model_inputs_of(model, length)
                answer(model, inputs)
                assert len(fast.graphs) <= 12
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
        print("bytes after each turn", used)
        assert used[2] <= used[0] * 1.05


def model_inputs_of(model, length):
    if LLAVA:
        from tiny import batch_of

        inputs = batch_of([length], [1], "left")
    else:
        from tiny_hf import batch_of

        inputs = batch_of(model, [length], [1], "left")
    return {k: v.to("cuda", torch.bfloat16 if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_masks_train_in_fused_attention(tower_folder, attention, dtype):
    if attention == "flash_attention_2" and (importlib.util.find_spec("flash_attn") is None or dtype == torch.float32):
        pytest.skip("flash_attn is not installed, or takes half precision alone")
    model, inputs = model_and_inputs(tower_folder, dtype, attention=attention)
    model.train().requires_grad_(False)
    model.config.use_cache = False
    if not LLAVA:
        model.config.text_config.use_cache = False
    handle = attach_pruners(model, settings())
    handle.pruners.requires_grad_(True)
    randomise_pruners(handle)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with prune_mode(model, "soft"):
        model(**inputs, labels=labels).loss.backward()
    for name, parameter in handle.pruners.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
