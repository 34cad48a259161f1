"""`TokenMerger`: a fixed number of vision tokens before the projector, chosen with the question in mind."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PruneConfig
from .modules import CrossAttention, init_weights


def pool_tokens(features: Tensor, count: int) -> Tensor:
    """Average pooling (B, N, D) -> (B, count, D): on the square grid if N and count are squares, else in sequence."""
    side, pooled_side = math.isqrt(features.shape[1]), math.isqrt(count)
    channels_first = features.transpose(1, 2)
    if side**2 == features.shape[1] and pooled_side**2 == count:
        return F.adaptive_avg_pool2d(channels_first.unflatten(2, (side, side)), pooled_side).flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool1d(channels_first, count).transpose(1, 2)


def mean_question(embeddings: nn.Module, ids: Tensor, question: Tensor) -> Tensor:
    """Mean embedding of each sample's question, zero without one: (B, T) ids and bool -> (B, D)."""
    embedded = embeddings(ids.masked_fill(~question, 0))
    weights = question.to(embedded.dtype)[..., None]
    return (embedded * weights).sum(1) / weights.sum(1).clamp(min=1)


class TokenMerger(nn.Module):
    """M learnable queries, scaled and shifted by the mean question embedding, cross-attend the vision features.

    The output is the average pooling of the features plus what the queries attended to, so that training starts from
    plain pooling.

    Args:
        vision_size: width of the vision tower's features.
        text_size: width of the language model's embeddings.
        config: `merger_tokens` and `merger_heads` are read.

    Raises:
        ValueError: `vision_size` is not divisible by `merger_heads`.
    """

    def __init__(self, vision_size: int, text_size: int, config: PruneConfig):
        super().__init__()
        if vision_size % config.merger_heads:
            raise ValueError(
                f"merger_heads {config.merger_heads} must divide the vision features' width {vision_size}"
            )
        self.queries = nn.Parameter(torch.empty(config.merger_tokens, vision_size))
        self.norm_question = nn.LayerNorm(text_size)
        self.modulation = nn.Linear(text_size, 2 * vision_size)
        self.norm_vision = nn.LayerNorm(vision_size)
        self.attention = CrossAttention(vision_size, vision_size, vision_size, config.merger_heads)
        init_weights(self)
        nn.init.normal_(self.queries, std=0.02)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.normal_(self.attention.to_output.weight, std=0.02)

    def forward(self, features: Tensor, question: Tensor) -> Tensor:
        """(B, N, vision_size) features and (B, text_size) mean question embeddings -> (B, M, vision_size)."""
        dtype = self.modulation.weight.dtype
        inputs = features.to(dtype)
        scale, shift = self.modulation(self.norm_question(question.to(dtype)))[:, None].chunk(2, dim=-1)
        queries = self.queries * (1 + scale) + shift
        merged = pool_tokens(inputs, len(self.queries)) + self.attention(queries, self.norm_vision(inputs))
        return merged.to(features.dtype)
