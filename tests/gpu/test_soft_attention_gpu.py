"""FlexAttention's bias is that of a mask: values and every gradient, at any length and for grouped heads."""

import pytest
import torch

from llava_prune.soft_attention import HIDDEN, biased_attention, causal_blocks

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def with_a_mask(query, key, value, bias):
    """By torch's own additive mask, in fp64."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1).double() for states in (key, value))
    future = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
    scores = query.double() @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias.double()[:, None, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("heads, key_heads, width", [(4, 4, 128), (9, 3, 64)])
@pytest.mark.parametrize("length", [17, 128, 623, 704])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_mask(heads, key_heads, width, length, dtype):
    generator = torch.Generator(DEVICE).manual_seed(length)

    def states(heads):
        drawn = torch.randn(2, heads, length, width, generator=generator, device=DEVICE)
        return drawn.to(dtype).requires_grad_()

    query, key, value = states(heads), states(key_heads), states(key_heads)
    bias = -14 * torch.rand(2, length, generator=generator, device=DEVICE)
    bias[0, 3:9] = HIDDEN
    bias.requires_grad_()
    blocks = causal_blocks(length, width, DEVICE)
    assert blocks is not None
    inputs = (query, key, value, bias)
    found, expected = biased_attention(*inputs, blocks), with_a_mask(*inputs)
    weights = torch.randn(found.shape, generator=generator, device=DEVICE)
    gradients = [torch.autograd.grad((o * weights).sum(), inputs) for o in (found.float(), expected)]
    for one, other in zip([found, *gradients[0]], [expected, *gradients[1]], strict=True):
        difference = (one.double() - other.double()).norm() / other.double().norm()
        assert difference < 8 * torch.finfo(dtype).eps, difference
