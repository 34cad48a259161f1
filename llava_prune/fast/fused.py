"""What a layer does between its matrix products, in one kernel each.

The stock modules are traced by torch.compile as they are, with the rounding they have. On an H100 a token of the 7B
shape took 8.8 ms in a graph of some 45 kernels a layer, of which the seven matrix products need 4.5 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder_layer import PLAIN, Parts


def fused_parts(backend: Any = "inductor") -> Parts:
    """`PLAIN`, each step compiled at its first call; sizes are symbols, so that few compilations serve all."""

    def compiled(function: Callable) -> Callable:
        # a half-precision value between two steps is rounded as it was
        options = {"emulate_precision_casts": True} if backend == "inductor" else None
        return torch.compile(function, dynamic=True, fullgraph=True, backend=backend, options=options)

    gated = compiled(_gated)

    def mlp(module: nn.Module, normed: Tensor) -> Tensor:
        return module.down_proj(gated(module.act_fn, module.gate_proj(normed), module.up_proj(normed)))

    return Parts(compiled(PLAIN.norm), compiled(PLAIN.add_norm), compiled(PLAIN.rotate), mlp)


def _gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up
