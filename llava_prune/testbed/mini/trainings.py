"""Pruner trainings of mini, each the product's own command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import PruneConfig
from .ablations import VARIANTS
from .jobs import Job
from .keys import TRAINING, digest, sources
from .size import MiniSize

COLLAPSED = "TrainingCollapsed"
PRESET = "mini"


@dataclass(frozen=True)
class TrainingSettings:
    """What all trainings share.

    Attributes:
        steps: optimizer steps.
        batch_size: questions a step.
        workers: processes that prepare pictures, of each training.
        bf16: bf16 base under autocast.
    """

    steps: int = 400
    batch_size: int = 16
    workers: int = 4
    bf16: bool = True


@dataclass(frozen=True)
class Training:
    """A variant at a budget with a seed.

    Attributes:
        variant: of `ablations.VARIANTS`.
        budget: average tokens.
        seed: of the pruners, the noise and the order of the data.
        job: the command.
        lora: whether the base comes with an adapter of its own.
        selection: threshold or topk, as in `PruneConfig`.
    """

    variant: str
    budget: float
    seed: int
    job: Job
    lora: bool
    selection: str

    @property
    def collapsed(self) -> bool:
        """Whether its guards stopped it."""
        return (self.job.record or {}).get("status") == "failed"

    def history(self) -> list[dict[str, Any]]:
        """What was logged while it trained; nothing of one that collapsed."""
        path = self.job.folder / "trainer_state.json"
        return json.loads(path.read_text())["log_history"] if path.is_file() else []


def plan_training(
    folder: Path,
    base: Path,
    base_key: str,
    data: Path,
    size: MiniSize,
    settings: TrainingSettings,
    variant: str,
    budget: float,
    seed: int,
) -> Training:
    """A training that is found again as long as all that determines it is the same; equal variants are one.

    Args:
        folder: of all trainings.
        base: the checkpoint.
        base_key: tells one base from another.
        data: folder of the data, whose name tells one from another.

    Raises:
        ValueError: the variant can not be had, as with layers whose floor is over the budget.
    """
    chosen = VARIANTS[variant]
    prune = {**size.prune, **chosen.prune, "target_token_num": budget}
    if prune.get("enable_token_merger"):
        prune.setdefault("merger_tokens", size.vision_tokens // 4)
    config = PruneConfig.load(PRESET, prune)
    layers = json.loads((base / "config.json").read_text())["text_config"]["num_hidden_layers"]
    config.check_layers(layers)
    tokens = config.merger_tokens if config.enable_token_merger else size.vision_tokens
    config.check_budget(tokens, layers)
    key = digest(
        base_key,
        data.name,
        config.to_dict(),
        chosen.flags,
        [settings.steps, settings.batch_size, settings.bf16, seed],
        sources(*TRAINING),
    )
    out = folder / f"{budget:g}-s{seed}-{key}"
    flags = {
        "stack": "hf",
        "model_name_or_path": base,
        "data_path": data / "train.json",
        "image_folder": data,
        "output_dir": out,
        "prune_config": PRESET,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "dataloader_num_workers": settings.workers,
        "bf16": settings.bf16,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.steps // 30),
        "seed": seed,
        "logging_steps": max(1, settings.steps // 80),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_max_length": 1024,
        **{f"prune_{name}": value for name, value in prune.items()},
        **chosen.flags,
    }
    name = f"{variant} at {budget:g}, seed {seed}"
    job = Job(name, out, ("-m", "llava_prune.train", *_arguments(flags)), expected_failure=COLLAPSED)
    return Training(variant, budget, seed, job, bool(chosen.flags.get("lora_enable")), config.selection)


def _arguments(flags: dict[str, Any]) -> list[str]:
    """`--name value`, of a list `--name value value`."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    return words
