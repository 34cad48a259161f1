"""A decoder layer in fewer kernels, and in ones that suit few rows.

What layers and pruners do between their matrix products is one kernel each: stock modules are traced by torch.compile
as they are, with their rounding between steps; a norm's sum and the exponential of an activation may still differ in
the last bit.

On an H100 at the 7B shape and 64 average tokens, bf16, batch 1, a token took 8.8 ms without this and 7.3 ms with it,
the first token 13.3 ms and 10.3 ms (of two machines, the second of which was the slower one on the plain path). Of the
7.3 ms the matrix products take 5.1 ms, at 1.15 times their floor.

Then a profile of preset `best` on an H200: 177 us a layer of 96 rows, 128 of them in matrix products, which write 4096
outputs in 14 us each (floor 7), one after the other; 14 us from the keys to the end of cuDNN's attention, which works
for 6; and 470 us at the first pruner, 190 of them in its network, the rest in a hundred kernels that find tokens and
settle which stay. So
- `SideBySide`: on an H100 queries, keys and values take 41 us together, where the output projection, of the size of
  each, takes 15.4; gate and up 70 (not tried apart there); a further token 6.8 ms, 7.1 to 7.4 before on other cards;
- FlashAttention-2 instead of cuDNN's for few rows: 12.6 us, no gain to speak of, taken back;
- keys rotated into the cache: still three kernels, of 3.6 us, since their layouts differ; no gain, taken back;
- decisions compiled, without a sort where places can be counted (`steps`): 300 us at the first pruner, on the H100;
- hooks looked for where modules changed: 0.2 ms before the first graph.
Together, before those two were taken back, 9.65 ms to the first token, 0.58 of the stock model's in the same graphs,
instead of 10.6 and 0.62.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder_layer import Parts
from .streams import SideBySide


def fused_parts(backend: Any = "inductor", products: Callable[..., list[Tensor]] | None = None) -> Parts:
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

    products = products or SideBySide()

    def mlp(module: nn.Module, hidden: Tensor) -> Tensor:
        gate, up = products((module.gate_proj, module.up_proj), hidden)
        return module.down_proj(step(_gated)(module.act_fn, gate, up))

    return Parts(step, products, mlp)


def _gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up
