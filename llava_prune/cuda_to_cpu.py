"""Code written for a GPU, on a machine without one: LLaVA's evaluation scripts name 'cuda' and fp16 in every line."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.half}


class CudaToCpu(TorchFunctionMode):
    """Within the block tensors asked to go to 'cuda' stay on the CPU, and those asked to be fp16 become fp32.

    In the calling thread alone, as all torch function modes.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _MOVES:
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.half:
            return args[0].float()
        return func(*(_on_cpu(a) for a in args), **{k: _on_cpu(v) for k, v in kwargs.items()})


def _on_cpu(value: Any) -> Any:
    if value is torch.float16:
        return torch.float32
    if isinstance(value, str | torch.device) and torch.device(value).type == "cuda":
        return torch.device("cpu")
    return value
