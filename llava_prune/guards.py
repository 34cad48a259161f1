"""Guards: a training whose task loss or keep ratio has left its band, or is not finite, stops and says what to do."""

from __future__ import annotations

import math
import statistics
from typing import Any

from .config import PruneConfig

TASK, GUIDANCE = "loss/task", "loss/guidance"
STILL = 0.005  # a keep ratio that falls by less is not on its way


class TrainingCollapsed(RuntimeError):
    """The keep ratio or a loss left its band; the last checkpoint is from before."""


def check_guards(config: PruneConfig, history: list[dict[str, Any]], num_layers: int, output_dir: str) -> None:
    """Stop when the last `guard_patience` logs all lie outside the band; single batches may well do.

    Args:
        config: `guard_patience`, `guard_task_loss` and `guard_keep_ratio` are read.
        history: the Trainer's `log_history`.
        num_layers: of the decoder.
        output_dir: of the training, for the message.

    Raises:
        TrainingCollapsed: with what to change.
    """
    patience = config.guard_patience
    advice = (
        f"; the last checkpoint in {output_dir} is from before this message. With other settings train into another "
        "output_dir, anew or from a checkpoint's pruners (--prune_start)"
    )
    _check_finite(history, patience, advice)
    entries = [entry for entry in history if TASK in entry]
    if len(entries) < 2 * patience:
        return
    recent = entries[-patience:]
    step, loss = recent[-1]["step"], recent[-1][TASK]
    start = statistics.median(entry[TASK] for entry in entries[:patience])
    if not any(entry[TASK] <= start + config.guard_task_loss for entry in recent):
        raise TrainingCollapsed(
            f"task loss {loss:.3g} at step {step} stays more than guard_task_loss {config.guard_task_loss:g} above "
            f"its start, {start:.3g}: the pruners drop what the answer needs. Lower pruner_lr or "
            "adversarial_weight_end, or raise target_warmup_ratio" + advice
        )
    floor = config.pruning_layers[0] / num_layers
    kept = [entry for entry in entries if "prune/keep_ratio" in entry][-patience:]  # not in logs without images
    if kept and not any(
        entry["prune/keep_ratio"] - floor >= config.guard_keep_ratio * (entry["prune/target_ratio"] - floor)
        for entry in kept
    ):
        raise TrainingCollapsed(
            f"average tokens stay at {kept[-1]['prune/keep_ratio']:.1%} of the vision tokens at step {step}, target "
            f"{kept[-1]['prune/target_ratio']:.1%}: the keep ratio collapsed. Lower pruner_lr or raise "
            "task_weight_start" + advice
        )
    held = [entry for entry in entries if entry.get("prune/target_ease") == 1 and "prune/keep_ratio" in entry]
    if len(held) >= 2 * patience:  # while the target is eased, what is kept lies behind it
        _check_pruned(held[-2 * patience :], config, advice)


def _check_pruned(entries: list[dict[str, Any]], config: PruneConfig, advice: str) -> None:
    ratios = [entry["prune/keep_ratio"] for entry in entries]
    falls = ratios[-1] < ratios[0] - STILL
    if not falls and not any(
        1 - entry["prune/keep_ratio"] >= config.guard_keep_ratio * (1 - entry["prune/target_ratio"])
        for entry in entries
    ):
        raise TrainingCollapsed(
            f"average tokens stay at {ratios[-1]:.1%} of the vision tokens at step {entries[-1]['step']}, target "
            f"{entries[-1]['prune/target_ratio']:.1%}: nothing is pruned. Raise sparsity_weight or pruner_lr, or try "
            "another estimator" + advice
        )


def _check_finite(history: list[dict[str, Any]], patience: int, advice: str) -> None:
    noted = [entry for entry in history if TASK in entry or GUIDANCE in entry][-patience:]
    losses = [entry.get(TASK, entry.get(GUIDANCE)) for entry in noted]
    if len(losses) == patience and not any(map(math.isfinite, losses)):
        raise TrainingCollapsed(
            f"the loss at step {noted[-1]['step']} is {losses[-1]}, as in the {patience} logs up to it: a weight is "
            "not finite any more. Lower pruner_lr, and leave pruner_qk_norm on" + advice
        )
