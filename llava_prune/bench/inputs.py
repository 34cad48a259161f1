"""Batches for a model with random weights: tokens and pixels out of a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import compat

FIRST_WORD = 3


def random_batch(model: nn.Module, batch: int, images: int, text: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of `generate`: `images` images and `text` text tokens a sample, half of those before the images.

    Args:
        model: a LLaVA-1.5, of either stack, on its device.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_input_embeddings().weight
    placeholder = compat.image_token(model)
    end = placeholder if placeholder > FIRST_WORD else len(weight)
    words = torch.randint(FIRST_WORD, end, (batch, text), generator=generator)
    of_image = 1 if placeholder < 0 else compat.vision_tokens_per_image(model)
    marks = torch.full((batch, images * of_image), placeholder)
    ids = torch.cat([words[:, : text // 2], marks, words[:, text // 2 :]], 1).to(weight.device)
    side = compat.vision_modules(model)[0].config.image_size
    pixels = torch.randn(batch * images, 3, side, side, generator=generator).to(weight.device, weight.dtype)
    if placeholder < 0:
        return {"inputs": ids, "images": pixels}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
