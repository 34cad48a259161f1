"""Schedules over training progress in [0, 1]: temperature, loss weights, target, and when masks become binary."""

import math
from dataclasses import dataclass

from .config import PruneConfig


def cosine(start: float, end: float, progress: float, ratio: float) -> float:
    """From `start` to `end` along half a cosine over the first `ratio` of training, then constant."""
    done = 1.0 if ratio <= 0 else min(max(progress, 0.0) / ratio, 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class ScheduleValues:
    """What the schedules say at one moment.

    `guidance_only` while guidance alone trains; `target_ease` is 0 while everything may be kept and 1 once the target
    holds in full; `mode` is that of the pruned pass: soft, masked, or hard where pruners stay as they are.
    """

    guidance_only: bool

    temperature: float
    task_weight: float
    adversarial_weight: float
    guidance_weight: float
    target_ease: float
    mode: str


def schedule(config: PruneConfig, step: int, max_steps: int) -> ScheduleValues:
    """Values for optimiser step `step` (0-based) of `max_steps`; the temperature falls exponentially.

    What is scheduled is scheduled over the steps after those of guidance alone.
    """
    alone = round(max_steps * config.guidance_only_ratio) if config.train_pruners else 0
    progress = max(step - alone, 0) / max(max_steps - alone, 1)
    done = min(progress / config.temperature_anneal_ratio, 1.0) if config.temperature_anneal_ratio > 0 else 1.0
    ratio = config.loss_weight_warmup_ratio
    guidance = cosine(config.guidance_weight, config.guidance_weight_end, progress, config.guidance_ratio)
    masked = step >= alone + round((max_steps - alone) * (1 - config.final_masked_ratio))
    return ScheduleValues(
        guidance_only=step < alone,
        temperature=config.temperature_start * (config.temperature_end / config.temperature_start) ** done,
        task_weight=cosine(config.task_weight_start, config.task_weight_end, progress, ratio),
        adversarial_weight=cosine(config.adversarial_weight_start, config.adversarial_weight_end, progress, ratio),
        guidance_weight=(config.guidance_weight if step < alone else guidance) if config.train_pruners else 0.0,
        target_ease=cosine(0.0, 1.0, progress, config.target_warmup_ratio) if config.train_pruners else 1.0,
        mode=("masked" if masked else "soft") if config.train_pruners else "hard",
    )
