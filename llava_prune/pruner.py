"""`LayerPruner`: which vision tokens does this question still need, from this layer on?"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PruneConfig
from .masks import capped
from .modules import CrossAttention, init_weights

QUESTION_MULTIPLE = 64  # tokens that a compiled pruner's question is padded to: few lengths, few programs
PLACE_OCTAVES = 5
PLACE_WIDTH = 4 * PLACE_OCTAVES


class LayerPruner(nn.Module):
    """Question-driven cross-attention and an MLP that give each vision token two logits, drop and keep.

    The decoder is causal and the image stands before the question, so vision hidden states know nothing of the
    question at any depth: the pruner reads the question's own hidden states. Vision tokens look at each other first,
    since a word or a thing is more than one patch; then the question looks at them, so that what it asks for can be
    the token that fits best and not every one that fits; then every vision token at the question. Only the tokens that
    are still there are looked at, so that it makes no difference whether others are hidden or gone.

    Vision and question are states of one residual stream, so one projection to `pruner_rank` serves both. It keeps
    the pruner small beside a decoder layer: 1.7 M parameters at width 4096, where projections of their own take 7 M.

    Args:
        hidden_size: width of the decoder.
        config: the pruner's own fields, `use_question`, `init_keep_logit`, `logit_cap` and those of the attention
            residual are read.
    """

    def __init__(self, hidden_size: int, config: PruneConfig):
        super().__init__()
        rank, dim = config.pruner_rank, config.pruner_dim
        self.use_question = config.use_question
        self.logit_cap = config.logit_cap
        self.norm_vision = nn.LayerNorm(hidden_size)
        self.norm_question = nn.LayerNorm(hidden_size)
        # stands in for the question where there is none
        self.no_question = nn.Parameter(torch.zeros(1, 1, rank))
        self.compress = nn.Linear(hidden_size, rank, bias=False)
        self.place = nn.Linear(PLACE_WIDTH, rank, bias=False)
        how = {"heads": config.pruner_heads, "qk_norm": config.pruner_qk_norm}
        self.neighbours = CrossAttention(rank, rank, min(rank, dim), output_dim=rank, **how)
        self.looking = CrossAttention(rank, rank, dim, output_dim=rank, **how)
        self.attention = CrossAttention(rank, rank, dim, **how)
        self.norm_joint = nn.LayerNorm(rank + dim)
        self.joint_hidden = nn.Linear(rank + dim, dim)
        self.joint_logits = nn.Linear(dim, 2)
        self.use_attn_residual = config.use_attn_residual
        if config.use_attn_residual:
            self.residual_weight = nn.Parameter(
                torch.tensor([float(config.attn_residual_weight)]), requires_grad=config.learn_attn_residual
            )
        init_weights(self)
        with torch.no_grad():
            # a token looks at what is alike and near from the start, instead of having to find out that it should
            self.neighbours.to_key.weight.copy_(self.neighbours.to_query.weight)
        nn.init.normal_(self.no_question)  # as large as what is compressed
        # small, not zero: a zero weight would give the layers below it no gradient
        nn.init.normal_(self.joint_logits.weight, std=0.02 / dim**0.5)
        with torch.no_grad():
            margin = config.logit_cap * math.atanh(config.init_keep_logit / config.logit_cap)
            self.joint_logits.bias.copy_(torch.tensor([-margin / 2, margin / 2]))

    def forward(
        self,
        vision: Tensor,
        places: Tensor,
        visible: Tensor,
        question: Tensor,
        question_mask: Tensor,
        attn_residual: Tensor | None = None,
    ) -> Tensor:
        """Logits of every vision token.

        Args:
            vision: (B, N, hidden_size) hidden states entering the pruning layer.
            places: (B, N, 2) row and column of each token in its picture, in (0, 1).
            visible: (B, N) fp32 bias of every look at each token: 0, or very low where it is gone.
            question: (B, Q, hidden_size) the question's hidden states at the same layer; Q may be 0.
            question_mask: (B, Q) bool, False at padding.
            attn_residual: (B, N) question-to-vision attention relative to uniform, or None.

        Returns:
            (B, N, 2) fp32 logits, drop and keep, whose difference is within `logit_cap`.
        """
        dtype = self.joint_hidden.weight.dtype
        if not self.use_question:
            question, question_mask = question[:, :0], question_mask[:, :0]
        mask = F.pad(question_mask, (1, 0), value=True)
        embedded = self.compress(self.norm_vision(vision.to(dtype))) + self.place(waves(places).to(dtype))
        normed = F.layer_norm(embedded, embedded.shape[-1:])
        embedded = embedded + self.neighbours(normed, normed, visible)
        context = self.compress(self.norm_question(question.to(dtype)))
        context = torch.cat([self.no_question.expand(len(question), -1, -1).to(context.dtype), context], dim=1)
        context = context + self.looking(context, embedded, visible)
        joint = torch.cat([embedded, self.attention(embedded, context, mask)], -1)
        logits = self.joint_logits(F.gelu(self.joint_hidden(self.norm_joint(joint)))).float()
        margin = logits[..., 1] - logits[..., 0]
        if attn_residual is not None:
            margin = margin + self.residual_weight.float() * attn_residual.float()
        # a mask that is sure has no gradient left: where all of a layer are, its pruner learns no more
        margin = capped(margin, self.logit_cap)
        return torch.stack([-margin / 2, margin / 2], -1)


class PrunerInputs(NamedTuple):
    """Arguments of `LayerPruner.forward`, which see for their shapes."""

    vision: Tensor
    places: Tensor
    visible: Tensor
    question: Tensor
    question_mask: Tensor
    attn_residual: Tensor | None


def logits_of(pruner: nn.Module, inputs: PrunerInputs, compiled: bool = False) -> Tensor:
    """(B, N, 2), what `pruner(*inputs)` says; compiled as a whole, one program for all pruners, if asked for."""
    if not compiled:
        return _logits(pruner, *inputs)
    filler = (0, -inputs.question.shape[1] % QUESTION_MULTIPLE)
    question, mask = F.pad(inputs.question, (0, 0, *filler)), F.pad(inputs.question_mask, filler)
    return _compiled()(pruner, *inputs._replace(question=question, question_mask=mask))


@cache
def _compiled() -> Callable[..., Tensor]:
    # of fixed shapes: a program for any shape failed to compile in one of three trainings (torch 2.11, H100)
    return torch.compile(_logits, dynamic=False)


def _logits(pruner: nn.Module, *inputs: Tensor | None) -> Tensor:
    return pruner(*inputs)


def waves(places: Tensor) -> Tensor:
    """Sines and cosines of rows and columns (B, N, 2), half a period a picture and up: (B, N, `PLACE_WIDTH`)."""
    octaves = math.pi * 2.0 ** torch.arange(PLACE_OCTAVES, device=places.device)
    angles = (places.float()[..., None] * octaves).flatten(2)
    return torch.cat([angles.sin(), angles.cos()], -1)
