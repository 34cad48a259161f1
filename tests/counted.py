"""FLOPs by torch's own counter, under each module's name."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(model, **inputs):
    """Module name without the model's class -> FLOPs of one forward.

    On a CPU the counter knows attention only as the matrix products it is made of.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return {name.removeprefix(f"{type(model).__name__}."): flops for name, flops in counts.items()}


def total(counts, prefix):
    """Sum over the modules right below `prefix`, `layers.` for instance."""
    return sum(flops for name, flops in counts.items() if name.startswith(prefix) and "." not in name[len(prefix) :])


def pruned_at(folder, *layers, tokens=41):
    """A config file of pruners at these layers, for commands that take one."""
    path = folder / "prune.yaml"
    path.write_text(f"pruning_layers: {list(layers)}\ntarget_token_num: {tokens}\npruner_dim: 16\npruner_heads: 4\n")
    return path
