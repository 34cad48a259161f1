"""What keeps a model's vision tokens: trained pruners, a baseline, or nothing (origin), attached by one call."""

from __future__ import annotations

from torch import nn

from .baselines import BaselineHandle, attach_baseline
from .checkpoint import load_pruners
from .config import PruneConfig
from .patch import PruneHandle, attach_pruners, check_mode
from .state import INFERENCE_MODES

# origin needs no pruners; these count tokens and decide nothing
OBSERVER = PruneConfig(pruning_layers=(1,), target_sparsity=0.1, pruner_dim=8, pruner_heads=1)


def check_method(pruners: str | None, baseline: str | None, mode: str, average_tokens: float | None) -> None:
    """Raises ValueError when the four do not say one thing to run."""
    check_mode(mode, INFERENCE_MODES)
    if pruners and baseline:
        raise ValueError("give pruners or a baseline, not both")
    if not pruners and not baseline and mode != "origin":
        raise ValueError(
            f"mode {mode!r} needs pruners (the output directory of a finished training) or a baseline; mode 'origin' "
            "needs neither"
        )
    if baseline and average_tokens is None:
        raise ValueError(f"baseline {baseline!r} needs average_tokens, the vision tokens to keep per decoder layer")
    if average_tokens is not None and not pruners and not baseline:
        raise ValueError("average_tokens is a budget of pruners or of a baseline: give one of them")


def attach_method(
    model: nn.Module,
    pruners: str | None = None,
    mode: str = "hard",
    baseline: str | None = None,
    average_tokens: float | None = None,
    allow_other_base: bool = False,
) -> PruneHandle | BaselineHandle:
    """Attach what was asked for and set the mode; `last_report` and `Sidecar` work in every case.

    Args:
        model: a LLaVA model without pruners.
        pruners: output directory of a pruner training.
        mode: `origin`, `masked` or `hard`; with origin neither pruners nor a baseline is needed.
        baseline: name of a training-free method instead of pruners.
        average_tokens: exact budget; None leaves it to the pruners' configuration. A baseline needs one.
        allow_other_base: as for `load_pruners`.

    Raises:
        ValueError: arguments that do not go together, and all that `load_pruners` and `attach_baseline` refuse.
        FileNotFoundError: `pruners` holds no checkpoint.
    """
    check_method(pruners, baseline, mode, average_tokens)
    if pruners:
        return load_pruners(model, pruners, mode, allow_other_base, average_tokens)
    if baseline:
        return attach_baseline(model, baseline, average_tokens, mode)
    return attach_pruners(model, OBSERVER)  # in mode origin
