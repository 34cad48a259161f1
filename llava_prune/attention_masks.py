"""The attention mask argument of a decoder layer, changed for what was pruned, per backend.

A backend takes either an additive (B, 1, Q, K) mask or None for plain causal attention (eager, sdpa), or a (B, K)
padding mask or None (flash_attention_2). Nothing larger than (B, 1, Q, K) is ever made.
"""

import torch
from torch import Tensor

from .drop import Rows


def causal_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask of the last `queries` of `keys` positions, (1, 1, queries, keys)."""
    lowest = torch.full((queries, keys), torch.finfo(dtype).min, dtype=dtype, device=device)
    return lowest.triu(keys - queries + 1)[None, None]


def with_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a key bias that carries a gradient.

    Args:
        mask: (B, 1, T, T) additive, or None for plain causal.
        bias: (B, T) fp32, 0 for keys left as they are.

    Returns:
        (B, 1, T, T) in `dtype`.
    """
    length = bias.shape[1]
    base = causal_mask(length, length, dtype, bias.device) if mask is None else additive(mask, dtype)
    # a sum of two large negatives would be -inf, and a row of -inf has no softmax
    total = (base + bias.to(dtype)[:, None, None, :]).clamp(min=torch.finfo(dtype).min)
    return total.expand(len(bias), 1, length, length).contiguous()


def without_keys(mask: Tensor | None, present: Tensor, queries: int, dtype: torch.dtype, flash: bool) -> Tensor:
    """Hide the keys where `present` (B, K) is False from the last `queries` positions; nothing is removed."""
    if flash:
        # flash attention packs the present keys, and causal order survives packing; queries go with them
        return (present if mask is None else present & mask.bool()).to(torch.int32)
    keys = present.shape[1]
    base = causal_mask(queries, keys, dtype, present.device) if mask is None else additive(mask, dtype)
    hidden = base.masked_fill(~present[:, None, None, :], torch.finfo(dtype).min)
    return hidden.expand(len(present), 1, queries, keys).contiguous()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True: attend) as an additive one; an additive one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def of_rows(mask: Tensor | None, rows: Rows, dtype: torch.dtype, flash: bool) -> Tensor | None:
    """The prefill's mask for the rows still present: queries and keys both shrink from T to S."""
    if flash:
        if mask is None:
            return rows.valid.to(torch.int32) if rows.ragged else None
        return (rows.take(mask, 1).bool() & rows.valid).to(torch.int32)
    if mask is None:
        if not rows.ragged:
            return None
        seen = rows.positions[:, None, :] <= rows.positions[:, :, None]
        shrunk = additive(seen[:, None], dtype)
    else:
        mask = additive(mask, dtype).expand(len(rows.positions), -1, -1, -1)
        batch = torch.arange(len(mask), device=mask.device)[:, None, None]
        shrunk = mask[batch, 0, rows.positions[:, :, None], rows.positions[:, None, :]][:, None]
    if rows.ragged:
        shrunk = shrunk.masked_fill(~rows.valid[:, None, None, :], torch.finfo(dtype).min)
    return shrunk.contiguous()


def of_cached_rows(
    mask: Tensor | None,
    rows: Rows,
    prefill_length: int,
    full_length: int,
    queries: int,
    dtype: torch.dtype,
    flash: bool,
) -> Tensor | None:
    """A decode step's mask for a layer whose cache holds the rows of the prefill and all later tokens.

    Args:
        mask: (B, 1, Q, full_length) additive, (B, full_length) for flash, or None.
        queries: Q, new tokens of this step.
    """
    new = full_length - prefill_length
    if flash:
        if mask is None and not rows.ragged:
            return None
        later = rows.valid.new_ones(len(rows.valid), new) if mask is None else mask[:, prefill_length:].bool()
        earlier = rows.valid if mask is None else rows.take(mask, 1).bool() & rows.valid
        return torch.cat([earlier, later], -1).to(torch.int32)
    if mask is None:
        if not rows.ragged and queries == 1:
            return None
        mask = causal_mask(queries, full_length, dtype, rows.valid.device)
    mask = additive(mask, dtype).expand(len(rows.positions), -1, -1, -1)
    earlier = rows.take(mask, 3).masked_fill(~rows.valid[:, None, None, :], torch.finfo(dtype).min)
    return torch.cat([earlier, mask[..., prefill_length:]], -1)
