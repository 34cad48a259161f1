"""FlexAttention with a bias on every key that learns: the fastest way for wide heads, compiled for a few lengths.

Its programs are for one shape each. Compiled for any length, its backward pass takes two to four times as long (the
tables in `soft_attention`), so lengths are rounded up, and shapes beyond the first `PROGRAMS` are left to others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NARROWEST = 128  # head width from which on it is the faster way, see the tables
MULTIPLE = 64  # lengths are rounded up to; what is added is behind all else, and causal attention hides it
PROGRAMS = 24  # each takes some seconds to compile, once
# of the backward kernels at heads of 128 in half precision: 1.86 ms in all for the 2.04 of torch's own choice (B16 H32
# T704, one H100, forward and backward)
BLOCKS = {
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 128,
    "bwd_BLOCK_M2": 128,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 8,
    "bwd_num_stages": 2,
}


class CausalFlex:
    """Causal attention of T queries to T keys, in programs that are made as they are needed."""

    def __init__(self) -> None:
        self._shapes: set[tuple] = set()

    def suits(self, query: Tensor, key: Tensor) -> bool:
        """Whether this is the way for these shapes: there is a program for them, or may be one more."""
        if not query.is_cuda or query.shape[2] != key.shape[2] or not available():
            return False
        batch, heads, length, width = query.shape
        if width < NARROWEST:
            return False
        shape = (batch, heads, key.shape[1], -(-length // MULTIPLE), width, query.dtype)
        if len(self._shapes) < PROGRAMS:
            self._shapes.add(shape)
        return shape in self._shapes

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """(B, heads, T, d), with `bias` (B, T) fp32 on the keys, scaled by 1 / sqrt(d)."""
        length = query.shape[2]
        if padding := -length % MULTIPLE:  # by nothing would copy all the same
            query, key, value = (F.pad(states, (0, 0, 0, padding)) for states in (query, key, value))
            bias = F.pad(bias, (0, padding))
        grouped = query.shape[1] != key.shape[1]
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS):  # past it, torch would make every score
            mask = _causal(query.shape[2], query.device)
            attended = _compiled(_fits_blocks(query))(query, key, value, bias, mask, grouped)
        return attended[:, :, :length] if padding else attended  # a slice's gradient is a copy too


@cache
def available() -> bool:
    """Whether the installed torch has FlexAttention as it is used here."""
    try:
        from torch._dynamo import config
        from torch.nn.attention.flex_attention import flex_attention  # noqa: F401
    except ImportError:
        return False
    return hasattr(config, "recompile_limit")


@cache
def causal_flex() -> CausalFlex:
    """The one of this process, which its programs belong to."""
    return CausalFlex()


@cache
def _causal(length: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def _fits_blocks(query: Tensor) -> bool:
    return query.shape[-1] == 128 and query.dtype in (torch.bfloat16, torch.float16)


@cache
def _compiled(blocks: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor, block_mask: object, grouped: bool
    ) -> Tensor:
        def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + bias[b, k]

        options = BLOCKS if blocks else None
        return flex_attention(
            query, key, value, score_mod=biased, block_mask=block_mask, enable_gqa=grouped, kernel_options=options
        )

    return torch.compile(attention, dynamic=False)
