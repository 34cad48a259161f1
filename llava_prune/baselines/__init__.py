"""Training-free ways to drop vision tokens, for comparison: the same patch, the same budgets, the same reports.

    handle = attach_baseline(model, "fastv", average_tokens=128)
    model.generate(...)  # pruned; prune_mode, last_report and detach_pruners work as with trained pruners

Each method is written from its paper; its docstring says what the published code does differently.
"""

from __future__ import annotations

from torch import nn

from ..budget import check_average
from ..patch import find_handle, set_mode
from .divprune import DivPrune
from .fastv import FastV
from .handle import BaselineHandle
from .pooling import Pooling
from .pyramiddrop import PyramidDrop
from .random import Random
from .sparsevlm import SparseVLM
from .tome import ToMe
from .uniform import Uniform
from .visionzip import VisionZip
from .vtw import VTW

METHODS = {
    method.name: method
    for method in (Random, Uniform, Pooling, ToMe, FastV, PyramidDrop, SparseVLM, VisionZip, DivPrune, VTW)
}

__all__ = ["METHODS", "BaselineHandle", "attach_baseline"]


def attach_baseline(
    model: nn.Module, name: str, average_tokens: float, mode: str = "hard", **settings: object
) -> BaselineHandle:
    """Put a training-free method on a LLaVA model, in place, and set the mode.

    Args:
        model: a LLaVA model, also inside PEFT.
        name: one of `METHODS`.
        average_tokens: vision tokens an image, averaged over the decoder layers. Never exceeded; what falls short is
            less than one token, except for `pooling` (whole rows and columns) and `vtw` (whole layers).
        mode: `origin`, `masked` or `hard`; for methods that act before the decoder the last two are one.
        settings: of the method, see its class.

    Returns:
        A handle with `.remove()`, also usable as `with attach_baseline(...):`.

    Raises:
        ValueError: no such method, the budget is under the method's floor or more than an image has, the model does
            not suit the method, or something is attached already.
    """
    if name not in METHODS:
        raise ValueError(f"no baseline {name!r}: use one of {', '.join(METHODS)}")
    if find_handle(model) is not None:
        raise ValueError("this model has pruners or a baseline already: call detach_pruners(model) first")
    check_average(average_tokens, None)
    handle = BaselineHandle(model, METHODS[name], average_tokens, **settings)
    check_average(average_tokens, handle.vision_tokens)
    handle._attach()
    try:
        set_mode(model, mode)
    except ValueError:
        handle.remove()
        raise
    return handle
