"""A bias as a further channel is the bias: values and every gradient, in the attention alone and in a model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law import settings as config_of
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import attach_pruners, prune_mode
from llava_prune.compat import find_decoder
from llava_prune.soft_attention import HIDDEN, biased_attention, biased_layer, check_compilable


def with_a_mask(query, key, value, bias):
    """The same by torch's own additive mask, in fp64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1).double() for states in (key, value))
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = query.double() @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias.double()[:, None, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ value


def states(batch, heads, length, width, generator, dtype=torch.float32):
    return torch.randn(batch, heads, length, width, generator=generator, dtype=dtype).requires_grad_()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 20), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_values_and_gradients_are_those_of_a_mask(batch, length, key_heads, seed):
    generator = torch.Generator().manual_seed(seed)
    query = states(batch, 4, length, 8, generator)
    key, value = (states(batch, key_heads, length, 8, generator) for _ in range(2))
    bias = (torch.rand(batch, length, generator=generator) * -14).requires_grad_()
    inputs = (query, key, value, bias)
    found, expected = biased_attention(*inputs), with_a_mask(*inputs)
    weights = torch.randn(found.shape, generator=generator)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((o * weights).sum(), inputs) for o in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_hidden_keys_weigh_nothing():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (states(1, 2, 9, 8, generator) for _ in range(3))
    bias = torch.zeros(1, 9)
    bias[0, 3:5] = HIDDEN
    changed = value.detach().clone()
    changed[:, :, 3:5] = 1e4
    found, expected = (biased_attention(query, key, v, bias)[:, :, 5:] for v in (value, changed))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_bias(dtype):
    """With queries of zero the weights are exp(bias) alone; what is left is the rounding of weights and values."""
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(1, 1, 64, 8, dtype=dtype)
    key, value = (torch.randn(1, 1, 64, 8, generator=generator).to(dtype) for _ in range(2))
    bias = torch.rand(1, 64, generator=generator) * -6
    found, exact = biased_attention(query, key, value, bias), with_a_mask(query, key, value, bias)
    rounded = with_a_mask(query, key, value, (bias * 8**0.5).to(dtype).float() / 8**0.5)
    error, of_rounding = (found - exact).abs().max(), (rounded - exact).abs().max()
    assert error < 2 * torch.finfo(dtype).eps + of_rounding / 2


@pytest.mark.parametrize("gated", [False, True])
def test_a_compiled_layer_is_the_layer(tower_folder, gated):
    """Of any length, in one compilation more than the first; for all layers alike."""
    decoder = tiny_llava(tower_folder).requires_grad_(False).model.double()  # or sums of other orders differ
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    for length in (9, 14, 11):
        hidden = torch.randn(2, length, 32, generator=generator, dtype=torch.float64)
        rotary = decoder.layers[0].self_attn.rotary_emb(hidden, seq_len=length)
        tables = tuple(table[:length].expand(2, -1, -1) for table in rotary)
        results = []
        for compiled in (False, True):
            learns = (-torch.arange(2.0 * length).view(2, length) / length).requires_grad_()
            bias_and_gate = (None, learns.exp()) if gated else (learns, None)
            states = hidden
            for layer in decoder.layers:
                states = biased_layer(layer, states, tables, *bias_and_gate, compiled)
            results.append((states, *torch.autograd.grad(states.square().sum(), learns)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_layers_with_adapters_are_not_compiled(tower_folder):
    from peft import LoraConfig, get_peft_model

    llava = tiny_llava(tower_folder)
    check_compilable(llava.model)
    adapted = get_peft_model(llava, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="compile_layers needs plain layers, the decoder has Linear"):
        check_compilable(find_decoder(adapted))


@pytest.mark.parametrize("mode", ["soft", "masked"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_training_step_is_that_of_eager_attention_with_a_mask(tower_folder, mode, side):
    losses, gradients = [], []
    for attention in ("eager", "sdpa"):
        model = tiny_llava(tower_folder, attention=attention, padding_side=side).train().requires_grad_(False)
        model.config.use_cache = False
        torch.manual_seed(0)
        handle = attach_pruners(model, config_of(use_attn_residual=True))
        handle.pruners.requires_grad_(True)
        randomise_pruners(handle)
        torch.manual_seed(1)  # of the Gumbel noise
        with prune_mode(model, mode):
            loss = model(**batch_of([9, 14, 8], [1, 0, 2], side, answers=[2, 3, 2])).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in handle.pruners.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
