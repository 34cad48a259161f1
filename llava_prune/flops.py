"""FLOPs of one prefill, from shapes alone.

Matrix products are counted: linear layers, attention scores and values, the patch embedding. Norms, activations,
softmax, rotary embeddings, the embedding table and the language model head are left out, as the field does; causal
attention is counted in full, as torch's counter does. A multiply-add is 2 FLOPs, except in conventions A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import PruneConfig
from .pruner import PLACE_WIDTH


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-style decoder.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the SwiGLU.
        layers: decoder layers.
        attention: attention heads x head width.
        key_value: key-value heads x head width; less than `attention` with grouped queries.
    """

    hidden: int
    intermediate: int
    layers: int
    attention: int
    key_value: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From the decoder's Hugging Face config."""
        heads = config.num_attention_heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            heads * width,
            key_value_heads * width,
        )


@dataclass(frozen=True)
class Convention:
    """One way the field counts a decoder layer with n rows, width d and MLP width m.

    Attributes:
        formula: FLOPs of one layer, as printed.
        source: who counts so.
        layer: the same as a function of n (fp64) and the shape.
    """

    formula: str
    source: str
    layer: Callable[[Tensor, DecoderShape], Tensor]


def _fastv(n: Tensor, shape: DecoderShape) -> Tensor:
    d, m = shape.hidden, shape.intermediate
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def _sparsevlm(n: Tensor, shape: DecoderShape) -> Tensor:
    d, m = shape.hidden, shape.intermediate
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def _two_per_multiply_add(n: Tensor, shape: DecoderShape) -> Tensor:
    d, m = shape.hidden, shape.intermediate
    projections = 4 * n * d * shape.attention + 4 * n * d * shape.key_value  # query and output, key and value
    return projections + 4 * n * n * shape.attention + 6 * n * d * m


def _dynamic_llava(n: Tensor, shape: DecoderShape) -> Tensor:
    d = shape.hidden
    return 32 * n * d * d + 4 * n * n * d


# A, B and D are formulas of multi-head attention and stay so for grouped queries; C counts those as they are.
CONVENTIONS = {
    "A": Convention("4nd²+2n²d+2ndm", "FastV", _fastv),
    "B": Convention("4nd²+2n²d+3ndm", "SparseVLM", _sparsevlm),
    "C": Convention("8nd²+4n²d+6ndm", "2 per multiply-add", _two_per_multiply_add),
    "D": Convention("32nd²+4n²d", "Dynamic-LLaVA", _dynamic_llava),
}


def decoder_flops(shape: DecoderShape, rows: Tensor, convention: str = "C") -> Tensor:
    """FLOPs of all decoder layers.

    Args:
        rows: (..., layers) rows of the sequence that enter each layer.
        convention: a key of `CONVENTIONS`.

    Returns:
        (...) fp64.
    """
    return CONVENTIONS[convention].layer(rows.double().cpu(), shape).sum(-1)


def pruner_flops(
    config: PruneConfig, shape: DecoderShape, before: Tensor, vision: Tensor, text: Tensor, question: Tensor
) -> Tensor:
    """FLOPs of all pruners, attention residuals included.

    Args:
        before: (B,) vision tokens before any pruning.
        vision: (B, layers) those that each decoder layer sees.
        text: (B,) text tokens.
        question: (B,) those of them that the pruners read.

    Returns:
        (B,) fp64.
    """
    d, r, p = shape.hidden, config.pruner_rank, config.pruner_dim
    entering = torch.cat([before[:, None], vision], 1).double().cpu()  # a pruner sees what the layer before it saw
    text, question = text.double().cpu(), question.double().cpu()
    asked, near = question * config.use_question, min(r, p)
    context = asked + 1  # a learned token stands beside the question
    total = torch.zeros_like(text)
    for layer in config.pruning_layers:
        n = entering[:, layer]
        # compression, place; query, key, value and output of its look at others; key and value; query, output, hidden,
        # logits
        per_vision = d * r + PLACE_WIDTH * r + 4 * r * near + 2 * r * p + r * p + p * p + (r + p) * p + 2 * p
        # query and output of its look; key and value
        per_context = r * p + p * r + 2 * r * p
        products = n * per_vision + asked * d * r + context * per_context + 4 * n * context * p + 2 * n * n * near
        total += 2 * products
        if config.use_attn_residual:
            total += attention_rows_flops(shape, n + text, question)
    return total


def attention_rows_flops(shape: DecoderShape, rows: Tensor, queries: Tensor) -> Tensor:
    """FLOPs of `attention_of_rows`: keys of `rows` (B,), queries and scores of `queries` (B,) of them, their mean."""
    rows, queries = rows.double().cpu(), queries.double().cpu()
    products = rows * shape.hidden * shape.key_value + queries * shape.hidden * shape.attention
    return 2 * (products + queries * rows * (shape.attention + 1))


def merger_flops(config: PruneConfig, vision_width: int, text_width: int, tokens: int, images: Tensor) -> Tensor:
    """FLOPs of the token merger.

    Args:
        vision_width, text_width: of the tower's features and of the language model's embeddings.
        tokens: features of one image before merging.
        images: (B,) images, or crops of images.

    Returns:
        (B,) fp64.
    """
    v, queries = vision_width, config.merger_tokens
    products = 2 * text_width * v + 2 * queries * v * v + 2 * tokens * v * v + 2 * queries * tokens * v
    return 2 * products * images.double().cpu()


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a CLIP, SigLIP or DINOv2 vision transformer.

    Attributes:
        hidden, intermediate, layers: of the transformer; every layer runs, whichever is selected.
        patches: of one image.
        patch_values: values of one patch, channels x side x side.
        tokens: rows in the transformer, patches and a class token where there is one.
    """

    hidden: int
    intermediate: int
    layers: int
    patches: int
    patch_values: int
    tokens: int

    @classmethod
    def of(cls, config: Any) -> TowerShape:
        """From the tower's Hugging Face config; raises ValueError for another kind of tower."""
        kinds = ("clip_vision_model", "siglip_vision_model", "dinov2")
        if config.model_type not in kinds or getattr(config, "use_swiglu_ffn", False):
            raise ValueError(
                f"the FLOPs of a {config.model_type} vision tower are not known: use a model with a CLIP, SigLIP or "
                "DINOv2 tower (the latter without SwiGLU)"
            )
        patches = (config.image_size // config.patch_size) ** 2
        return cls(
            config.hidden_size,
            getattr(config, "intermediate_size", None) or config.hidden_size * config.mlp_ratio,
            config.num_hidden_layers,
            patches,
            config.num_channels * config.patch_size**2,
            patches + (config.model_type != "siglip_vision_model"),
        )


def tower_flops(shape: TowerShape, images: float) -> float:
    """FLOPs of a vision tower on `images` images (or crops)."""
    n, d, m = shape.tokens, shape.hidden, shape.intermediate
    layer = 8 * n * d * d + 4 * n * n * d + 4 * n * d * m
    return float(images * (2 * shape.patches * shape.patch_values * d + shape.layers * layer))


def projector_flops(widths: Iterable[tuple[int, int]], rows: float) -> float:
    """FLOPs of a projector of linear layers, given (input, output) widths, on `rows` vision features."""
    return float(2 * rows * sum(inputs * outputs for inputs, outputs in widths))


def kv_bytes(shape: DecoderShape, rows: Tensor, bytes_per_value: int) -> Tensor:
    """Bytes of a key-value cache that holds `rows` (..., layers) rows in each layer -> (...) fp64."""
    return 2 * shape.key_value * bytes_per_value * rows.double().cpu().sum(-1)
