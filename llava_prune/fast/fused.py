"""A decoder layer in fewer kernels, and in ones that suit few rows.

What layers and pruners do between their matrix products is one kernel each: stock modules are traced by torch.compile
as they are, with their rounding between steps; a norm's sum and the exponential of an activation may still differ in
the last bit.

On an H100 at the 7B shape and 64 average tokens, bf16, batch 1, a token took 8.8 ms without this and 7.3 ms with it,
the first token 13.3 ms and 10.3 ms (of two machines, the second of which was the slower one on the plain path). Of the
7.3 ms the matrix products take 5.1 ms, at 1.15 times their floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..decoder_layer import PLAIN, Parts
from .streams import MOST_ROWS, SideBySide

# without cuDNN's, which for few rows spends more time on beginning than on attention
OF_FEW_ROWS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fused_parts(backend: Any = "inductor") -> Parts:
    """`PLAIN`, each step compiled at its first call; sizes are symbols, so that few compilations serve all.

    Past torch's limit of compilations a process (8 a step, say of several models) steps run as they are.
    """
    compiled: dict[Callable, Callable] = {}

    def step(function: Callable) -> Callable:
        if function not in compiled:
            # a half-precision value between two steps is rounded as it was
            options = {"emulate_precision_casts": True} if backend == "inductor" else None
            compiled[function] = torch.compile(function, dynamic=True, backend=backend, options=options)
        return compiled[function]

    products = SideBySide() if backend == "inductor" else PLAIN.products

    def mlp(module: nn.Module, hidden: Tensor) -> Tensor:
        gate, up = products((module.gate_proj, module.up_proj), hidden)
        return module.down_proj(step(_gated)(module.act_fn, gate, up))

    return Parts(step, products, _causal, mlp)


def _gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.shape[0] * query.shape[2] > MOST_ROWS:
        return PLAIN.causal(query, key, value)
    with sdpa_kernel(OF_FEW_ROWS):
        return PLAIN.causal(query, key, value)
