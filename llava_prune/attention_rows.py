"""The attention that chosen rows pay in a decoder layer, without the rest of the attention matrix.

It is computed from the layer's own projections, so it needs no eager attention and no (B, H, T, T) tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import compat
from .drop import Rows
from .layout import TokenLayout, gather_rows


@torch.no_grad()
def attention_of_rows(
    layer: nn.Module,
    call: dict[str, Any],
    layout: TokenLayout,
    rows: Rows,
    present: Tensor | None,
    index: Tensor,
    valid: Tensor,
) -> Tensor:
    """Mean attention that the rows `index` pay each row, over heads and over those rows.

    Args:
        layer: the decoder layer; its `input_layernorm`, `q_proj` and `k_proj` are used.
        call: the layer's arguments, hidden states (B, S, D).
        rows: which positions the S rows are.
        present: (B, S) bool, rows that may be attended, or None for all.
        index: (B, Q) long, the rows that attend.
        valid: (B, Q) bool, False at filler.

    Returns:
        (B, S) fp32, zero for samples without a valid row.
    """
    attention = layer.self_attn
    hidden = layer.input_layernorm(call["hidden_states"])
    head_dim = attention.head_dim
    length = layout.valid.shape[1]
    cos, sin = compat.rotary_tables(attention, call, hidden, length)
    cos, sin = cos.expand(len(hidden), -1, -1), sin.expand(len(hidden), -1, -1)

    key = attention.k_proj(hidden).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    key = compat.apply_rotary(key, cos, sin)
    query = attention.q_proj(gather_rows(hidden, index)).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    query = compat.apply_rotary(query, gather_rows(cos, index), gather_rows(sin, index))
    query = query.unflatten(1, (key.shape[1], -1))  # (B, key heads, group, Q, d)

    scores = torch.einsum("bkgqd,bksd->bkgqs", query.float(), key.float()) / head_dim**0.5
    allowed = rows.flags(layout.valid)
    if present is not None:
        allowed = allowed & present
    positions = rows.positions.gather(1, index)
    seen = (rows.positions[:, None, :] <= positions[:, :, None]) & allowed[:, None, :]
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
    paid = scores.softmax(-1).mean((1, 2))  # (B, Q, S)
    weights = valid.float() / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bqs,bq->bs", paid, weights)
