"""What was kept, and what it costs: tokens per layer, average tokens, FLOPs of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .patch import PruneHandle, require_handle


@dataclass(frozen=True)
class Report:
    """Tokens of the latest forward (of the prefill, after `generate`).

    Attributes:
        tokens_per_layer: (B, num_layers) long, vision tokens that enter each decoder layer.
        average_tokens: (B,) fp32, their mean over the decoder layers: the field's "192 tokens".
        kept: pruning layer -> one tensor a sample, indices of the kept tokens among the sample's vision tokens.
        text_tokens: (B,) long, text tokens of the prefill.
        vision_tokens: (B,) long, vision tokens before any pruning.
    """

    tokens_per_layer: Tensor
    average_tokens: Tensor
    kept: dict[int, list[Tensor]]
    text_tokens: Tensor
    vision_tokens: Tensor


def last_report(model: nn.Module) -> Report:
    """What the latest forward of `model` kept.

    Raises:
        ValueError: no pruners attached, or no forward with an image has run since.
    """
    handle = require_handle(model)
    record = handle.state.record
    if record is None:
        raise ValueError("no forward with an image has run since the pruners were attached, or the last had no image")
    tokens = record.tokens_per_layer(handle.num_layers)
    return Report(
        tokens_per_layer=tokens,
        average_tokens=tokens.float().mean(-1),
        kept={layer: [row.nonzero().flatten() for row in kept] for layer, kept in record.kept.items()},
        text_tokens=record.layout.text.sum(-1),
        vision_tokens=record.layout.vision_counts,
    )


def llm_flops(handle: PruneHandle, tokens_per_layer: Tensor, text_tokens: Tensor, pruned: bool) -> Tensor:
    """FLOPs of one prefill of the decoder layers, 2 per multiply-add, pruners included if `pruned`.

    Per layer and n tokens: 4 n d^2 (query, output) + 4 n d d_kv (key, value) + 4 n^2 d (scores, values) + 6 n d m
    (SwiGLU); for plain multi-head attention that is the field's 8 n d^2 + 4 n^2 d + 6 n d m. Embeddings, norms, rotary
    embeddings and the language model head are left out, as they are there.

    Args:
        tokens_per_layer: (B, num_layers) vision tokens entering each layer.
        text_tokens: (B,).

    Returns:
        (B,) fp64.
    """
    config = handle.decoder.config
    d, m = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    kv = d // heads * (getattr(config, "num_key_value_heads", None) or heads)
    n = (tokens_per_layer + text_tokens[:, None]).double()
    total = (4 * n * d * d + 4 * n * d * kv + 4 * n**2 * d + 6 * n * d * m).sum(-1)
    return total + pruner_flops(handle, tokens_per_layer, text_tokens) if pruned else total


def pruner_flops(handle: PruneHandle, tokens_per_layer: Tensor, text_tokens: Tensor) -> Tensor:
    """FLOPs of all pruners in one prefill, (B,) fp64; all text tokens are counted as question, an upper bound."""
    d, r, p = handle.hidden_size, handle.config.pruner_rank, handle.config.pruner_dim
    total = torch.zeros(len(text_tokens), dtype=torch.float64)
    question = text_tokens.double().cpu() + 1
    for layer in handle.config.pruning_layers:
        n = tokens_per_layer[:, layer - 1].double().cpu()  # what enters the pruner is what the layer before had
        per_vision = d * r + r * p + p * p + (r + p) * p + 2 * p  # compress, query, output, hidden, logits
        per_question = d * r + 2 * r * p  # compress, key, value
        total += 2 * (n * per_vision + question * per_question + 2 * n * question * p)
        if handle.config.use_attn_residual:
            total += 2 * ((n + question) * d * d + question * d * d + question * (n + question) * d)
    return total
