"""Attention with a bias that learns: FlexAttention and a channel more give the same, gradients too."""

import pytest
import torch

from llava_prune.flex import CausalFlex, available, causal_flex
from llava_prune.soft_attention import biased_attention, by_channels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [128, 150])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_are_the_same(length, key_heads, dtype):
    if not available():
        pytest.skip("this torch has no FlexAttention")
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    query = drawn(3, 8, length, 128).to(dtype).requires_grad_()
    key, value = (drawn(3, key_heads, length, 128).to(dtype).requires_grad_() for _ in range(2))
    bias = (-3 * drawn(3, length).abs()).requires_grad_()
    weights = drawn(3, 8, length, 128).to(dtype)
    assert causal_flex().suits(query, key)
    results = []
    for way in (biased_attention, by_channels):
        attended = way(query, key, value, bias)
        results.append([attended, *torch.autograd.grad(attended, (query, key, value, bias), weights)])
    for one, other in zip(*results, strict=True):
        difference = (one.float() - other.float()).norm() / other.float().norm()
        assert difference < (2e-2 if dtype == torch.bfloat16 else 5e-3), difference


def test_shapes_beyond_the_programs_are_left_to_channels(monkeypatch):
    if not available():
        pytest.skip("this torch has no FlexAttention")
    monkeypatch.setattr("llava_prune.flex.PROGRAMS", 1)
    flex, states = CausalFlex(), torch.zeros(1, 1, 300, 128, device="cuda")
    assert [flex.suits(*[states[:, :, :length]] * 2) for length in (60, 64, 65, 33)] == [True, True, False, True]
    assert not flex.suits(*[states[..., :64]] * 2)  # narrow heads
