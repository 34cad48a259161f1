"""Steps of a stage between its layers, each a function of tensors that can be compiled."""

from __future__ import annotations

from torch import Tensor

from ..decoder_layer import Tables
from ..drop import Rows
from ..layout import gather_rows, marked, padded_index, placed
from ..masks import selected


def left_over(keep: Tensor, hidden: Tensor, source: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is kept of (B, S, D) hidden states and (B, S) sources, in `width` rows, which are valid, and how many."""
    index, valid = padded_index(keep, width=width)
    return gather_rows(hidden, index), source.gather(1, index), valid, valid.sum(-1)


def tables_of(position: Tensor, source: Tensor, cos: Tensor, sin: Tensor) -> Tables:
    """(B, S, head width) cos and sin of the rows `source` (B, S), from those of all positions (P, head width)."""
    rows = position.gather(1, source)
    return cos[rows], sin[rows]


def indexed(
    source: Tensor,
    valid: Tensor,
    vision: Tensor,
    question: Tensor,
    predicting: Tensor | None,
    vision_width: int,
    question_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Which of the rows `source` (B, S) are vision, and where the vision tokens and the question are among them.

    Args:
        vision, question, predicting: (B, T) bool, of the packed prompt.

    Returns:
        is_vision (B, S); of `LayerView` vision_index, alive, predicting, question_index and question_valid.
    """
    rows = Rows(source, valid, ragged=True)
    is_vision = rows.flags(vision)
    vision_index, alive = padded_index(is_vision, width=vision_width)
    needed = None if predicting is None else rows.flags(predicting).gather(1, vision_index) & alive
    return is_vision, vision_index, alive, needed, *padded_index(rows.flags(question), width=question_width)


def settled(
    value: Tensor,
    alive: Tensor,
    counts: Tensor | None,
    needed: Tensor | None,
    vision_index: Tensor,
    is_vision: Tensor,
    source: Tensor,
    valid: Tensor,
    threshold: float,
    min_keep: int,
    max_keep: int | None,
    prompt_index: Tensor,
    prompt_valid: Tensor,
    prompt_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decision and, for the report, what it says of the prompt: in a graph that costs no launches.

    Args:
        prompt_index, prompt_valid: (B, N) the prompt's vision tokens, among `prompt_rows` rows.

    Returns:
        keep, kept and vision_kept of `StageRows`, and its probability if `value` is one.
    """
    chosen = selected(value, alive, counts, needed, threshold, min_keep, max_keep)
    keep = valid & (~is_vision | marked(vision_index, chosen, source.shape[1]))
    vision_kept = marked(source, keep, prompt_rows).gather(1, prompt_index) & prompt_valid
    of_rows = placed(vision_index, value, alive, source.shape[1])
    of_prompt = placed(source, of_rows, ~of_rows.isnan(), prompt_rows)
    probability = of_prompt.gather(1, prompt_index).masked_fill(~prompt_valid, float("nan"))
    return keep, keep.sum(-1), vision_kept, probability
