"""Guidance: what the unpruned model's answer depends on, as a target of the keep logits.

The task's gradient is a noisy word about the few tokens that one draw kept, and says nothing while nothing is
dropped: an answer that is sure has no slope left. In the unpruned pass, which is run for the discriminator anyway, the
log-odds of the answer have one, to all tokens at once: to a gate on the value that a token offers to attention. To
first order that is what the token does for the answer (saliency: Simonyan et al. 2013, arXiv:1312.6034; of a gate in
attention: Michel et al. 2019, arXiv:1905.10650, eq. 2). A token counts with its slopes above 0, added up over layers.

Tried on testbed.mini, the base asked held-back questions with the best K of 576 tokens from layer 1 on, 60 questions a
line (a second 60 below the bar); right of the answers, 98.3 % with all tokens:

| tokens ordered by | K = 46 | K = 14 (13) |
|---|---|---|
| chance | 33 % | 20 % |
| attention of question and answer, mean over heads, rows and layers | 68 % | 43 % |
| attention of the answer, its maximum over them | 77 % | 63 % |
| slopes, absolute values added up over layers | 90 % | 82 % |
|---|---|---|
| slopes, absolute values added up | 87 % | 77 % |
| slopes, their sum's absolute value | 92 % | |
| slopes above 0, added up | 97 % | 90 % |

(Of 1,000 questions to another base, 96.7 % with all tokens, 93.9 % with the 46.)

The table is of slopes to a bias on a token's attention. Slopes to its gate rank as well: the best 41, 29 and 22 of 144
average tokens give 87.9, 85.7 and 85.5 % right on the testbed of the default run, for 88.5, 85.7 and 84.0 % (99.8 %
with all tokens), and leave attention as fast as it is.

Slopes speak of the whole picture, where two tokens that say the same are worth half each. Asked again while all but
the best 256, 128, 64 and 40 average tokens are hidden, and averaged, they order better: 96.5 % right at 64 average
tokens for 94.5 %, 90.0 % at 32 for 81.3 % (512 questions, a third base, 99.0 % with all tokens). Pruners did not learn
more from them yet, so they are not asked again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import compat
from .layout import IGNORE_INDEX, gather_rows, padded_index
from .losses import guidance_loss
from .pruner import logits_of
from .replay import Lesson
from .soft_attention import HIDDEN, biased_layer
from .state import ForwardRecord

if TYPE_CHECKING:
    from .patch import PruneHandle


class GuidedPass(NamedTuple):
    """The unpruned pass.

    Attributes:
        features: layer -> (B, T, hidden_size) outputs of the layers asked for.
        entering: pruning layer -> (B, T, hidden_size) what entered it.
        shares: pruning layer -> (B, N) fp32 share of each vision token by its slopes in this layer and all later
            ones, 0 for samples without a vision token or an answer.
    """

    features: dict[int, Tensor]
    entering: dict[int, Tensor]
    shares: dict[int, Tensor]


def guided_pass(
    decoder: nn.Module,
    head: nn.Module,
    record: ForwardRecord,
    pruning_layers: tuple[int, ...],
    feature_layers: Iterable[int],
    compiled: bool = False,
) -> GuidedPass:
    """The unpruned pass from the hidden states that entered the first pruner, and what its answers depend on.

    Takes a backward pass through the layers, whose weights get no gradient; checkpointed if the decoder is.

    Args:
        decoder, head: of the model.
        record: of the pruned pass of the same batch, whose layout has labels.
        pruning_layers: ascending.
        feature_layers: whose outputs are wanted.
        compiled: whether layers are.
    """
    call, layout = record.prefix, record.layout
    hidden = call["hidden_states"]
    layers = list(decoder.layers)[pruning_layers[0] :]
    cos, sin = compat.rotary_tables(layers[0].self_attn, call, hidden, hidden.shape[1])
    tables = (cos.expand(len(hidden), -1, -1), sin.expand(len(hidden), -1, -1))
    bias = _padding_bias(layout.valid)
    gates, features, entering, wanted = [], {}, {}, set(feature_layers)
    with torch.enable_grad():
        for index, layer in enumerate(layers, pruning_layers[0]):
            gates.append(torch.ones_like(layout.valid, dtype=torch.float32).requires_grad_())
            if index in pruning_layers:
                entering[index] = hidden.detach()
            hidden = _run(decoder, layer, hidden, tables, bias, gates[-1], compiled)
            if index in wanted:
                features[index] = hidden.detach()
        odds = _log_odds(decoder, head, hidden, layout.labels)
        slopes = torch.stack(torch.autograd.grad(odds, gates))  # (layers, B, T)
    paid = slopes.relu().flip(0).cumsum(0).flip(0)
    shares = {}
    for layer in pruning_layers:
        share = paid[layer - pruning_layers[0]].gather(1, layout.vision_index) * layout.vision_valid
        shares[layer] = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return GuidedPass(features, entering, shares)


def lessons_of(handle: PruneHandle, head: nn.Module, record: ForwardRecord) -> dict[int, Lesson]:
    """What every pruner is shown by the unpruned pass, and what is right; arguments as `guided_pass`."""
    layers, compiled = handle.config.pruning_layers, handle.config.compile_layers
    unpruned = guided_pass(handle.decoder, head, record, layers, (), compiled)
    valid = record.layout.vision_valid
    return {
        layer: Lesson(handle.pruner_inputs(layer, hidden, record), unpruned.shares[layer], valid)
        for layer, hidden in unpruned.entering.items()
    }


def guidance_of(pruners: dict[int, nn.Module], lessons: dict[int, Lesson], compiled: bool = False) -> Tensor:
    """The term that has every pruner learn its lesson, mean over pruners."""
    logits = {layer: logits_of(pruner, lessons[layer].inputs, compiled) for layer, pruner in pruners.items()}
    return mean_guidance(logits, {layer: (lessons[layer].share, lessons[layer].valid) for layer in pruners})


def mean_guidance(logits: dict[int, Tensor], targets: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """The term that has every pruner rank the tokens as the unpruned answer depends on them, mean over pruners.

    Args:
        logits: pruning layer -> (B, N, 2).
        targets: pruning layer -> share and valid, both (B, N).
    """
    terms = []
    for layer, (share, valid) in targets.items():
        weights = valid.any(-1).float()  # text alone teaches nothing
        terms.append(guidance_loss(logits[layer], share, valid, weights))
    return torch.stack(terms).mean()


def _padding_bias(valid: Tensor) -> Tensor | None:
    """(B, T) fp32 that hides padding; None where it stands behind all else, since causal attention hides that."""
    if not (valid[:, 1:] & ~valid[:, :-1]).any():
        return None
    return torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, HIDDEN)


def _run(decoder: nn.Module, layer: nn.Module, *inputs: Any) -> Tensor:
    if getattr(decoder, "gradient_checkpointing", False):
        return checkpoint(biased_layer, layer, *inputs, use_reentrant=False)
    return biased_layer(layer, *inputs)


def _log_odds(decoder: nn.Module, head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of the supervised tokens' log p / (1 - p), without the last of an answer, which says that it ends here."""
    supervised = labels[:, 1:] != IGNORE_INDEX
    left = supervised.flip(-1).cumsum(-1).flip(-1)
    index, valid = padded_index(supervised & ((left > 1) | (supervised.sum(-1, keepdim=True) == 1)))
    logits = head(decoder.norm(gather_rows(hidden, index))).float()
    answer = labels[:, 1:].gather(1, index).clamp(min=0)[..., None]
    others = logits.scatter(-1, answer, -torch.inf).logsumexp(-1)
    return ((logits.gather(-1, answer)[..., 0] - others) * valid).sum()
