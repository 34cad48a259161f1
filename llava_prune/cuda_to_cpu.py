"""Code written for a GPU, on a machine without one: LLaVA's evaluation scripts name 'cuda' and fp16 in every line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CudaToCpu:
    """Within the block, tensors asked to go to 'cuda' stay on the CPU, and those asked to be fp16 become fp32.

    Methods of `torch.Tensor` stand in for those it inherits, since a torch function mode is the calling thread's alone
    and programs prepare their inputs in others.
    """

    def __enter__(self) -> CudaToCpu:
        for name, method in (("to", _to(torch.Tensor.to)), ("cuda", _cuda), ("half", torch.Tensor.float)):
            setattr(torch.Tensor, name, method)
        return self

    def __exit__(self, *exc: object) -> None:
        for name in ("to", "cuda", "half"):
            delattr(torch.Tensor, name)


def _to(original: Callable) -> Callable:
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(tensor, *map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})

    return to


def _cuda(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _on_cpu(value: Any) -> Any:
    if value is torch.float16:
        return torch.float32
    if isinstance(value, str | torch.device) and torch.device(value).type == "cuda":
        return torch.device("cpu")
    return value
