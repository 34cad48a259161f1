"""Guards: a training whose task loss or keep ratio has left its band stops, and says what to do."""

from __future__ import annotations

import statistics
from typing import Any

from .config import PruneConfig


class TrainingCollapsed(RuntimeError):
    """The keep ratio or the task loss left its band; the last checkpoint is from before."""


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
    entries = [entry for entry in history if "loss/task" in entry]
    if len(entries) < 2 * patience:
        return
    recent = entries[-patience:]
    step, loss = recent[-1]["step"], recent[-1]["loss/task"]
    start = statistics.median(entry["loss/task"] for entry in entries[:patience])
    advice = f"; the last checkpoint in {output_dir} is from before this message"
    if not any(entry["loss/task"] <= start + config.guard_task_loss for entry in recent):  # so that nan is outside
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
