"""Multi-turn training data: one sampled turn is supervised, earlier ones are context, later ones are cut.

The pruner reads the question; with every turn supervised at once it would read later questions, and answers, before
they are asked.
"""

from typing import Any

import torch
from torch import Tensor

from .compat import IMAGE_TOKEN_INDEX
from .layout import IGNORE_INDEX


def supervise_one_turn(inputs: dict[str, Any], draw: Tensor, image_token: int = IMAGE_TOKEN_INDEX) -> dict[str, Any]:
    """Labels of one turn a sample, everything after it cut by the attention mask.

    Turns that end before the sample's last image are never drawn, since cutting an image would shift the others.

    Args:
        inputs: `input_ids`, `labels` and `attention_mask` (B, T), and whatever else; not changed.
        draw: (B,) in [0, 1), which of the eligible turns.
        image_token: the image placeholder in `input_ids`.

    Returns:
        A copy with new `labels` and `attention_mask`.
    """
    labels, ids, mask = inputs["labels"], inputs["input_ids"], inputs["attention_mask"]
    supervised = (labels != IGNORE_INDEX) & mask.bool()
    starts = supervised & ~torch.nn.functional.pad(supervised, (1, -1), value=False)
    turn = starts.cumsum(-1)  # 1-based inside a turn
    turns = turn[:, -1]
    images_left = ((ids == image_token) & mask.bool()).flip(-1).cumsum(-1).flip(-1) > 0
    first = (starts & images_left).sum(-1)  # turns that begin before the last image
    eligible = (turns - first).clamp(min=1)
    chosen = torch.minimum(first + 1 + (draw.to(labels.device) * eligible).long(), turns.clamp(min=1))
    is_chosen = supervised & (turn == chosen[:, None])
    ends = is_chosen.flip(-1).cumsum(-1).flip(-1) > 0  # up to and with the last chosen token
    untouched = (turns == 0)[:, None]
    return {
        **inputs,
        "labels": torch.where(is_chosen, labels, IGNORE_INDEX),
        "attention_mask": (mask.bool() & (ends | untouched)).to(mask.dtype),
    }
