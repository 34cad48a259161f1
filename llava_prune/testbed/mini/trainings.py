"""Pruner trainings of mini, each the product's own command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import PruneConfig
from .ablations import ADAPTED, VARIANTS
from .jobs import Job
from .keys import TRAINING, digest, sources
from .size import MiniSize

COLLAPSED = "TrainingCollapsed"
PRESET = "mini"


@dataclass(frozen=True)
class TrainingSettings:
    """What all trainings share.

    Attributes:
        steps: optimizer steps of a second training.
        batch_size: questions a step of that.
        guided_steps: of the main training, by guidance alone, which all budgets of a seed share.
        guided_batch_size: questions a step of that.
        adapted_steps: of an adaptation to the pruners of a seed, which all budgets share.
        adapted_batch_size: questions a step of that.
        workers: processes that prepare pictures, of each training.
        bf16: bf16 base under autocast.
        compile: the decoder's layers, but of LoRA.
    """

    steps: int = 400
    batch_size: int = 16
    guided_steps: int = 1500
    guided_batch_size: int = 48
    adapted_steps: int = 400
    adapted_batch_size: int = 64
    workers: int = 4
    bf16: bool = True
    compile: bool = True


@dataclass(frozen=True)
class Training:
    """A variant at a budget with a seed.

    Attributes:
        variant: of `ablations.VARIANTS`.
        budget: average tokens.
        seed: of the pruners, the noise and the order of the data.
        job: the command.
        start: the command before it, or None.
        lora: whether the base comes with an adapter of its own.
        selection: threshold or topk, as in `PruneConfig`.
    """

    variant: str
    budget: float
    seed: int
    job: Job
    start: Job | None
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


@dataclass(frozen=True)
class Trainings:
    """All trainings of one base on one set of data.

    Attributes:
        folder: of all of them.
        base: the checkpoint.
        base_key: tells one base from another.
        data: folder of the data, whose name tells one from another.
        size, settings: what they share.
    """

    folder: Path
    base: Path
    base_key: str
    data: Path
    size: MiniSize
    settings: TrainingSettings

    def plan(self, variant: str, budget: float, seed: int) -> Training:
        """A training that is found again as long as all that determines it is the same; equal variants are one.

        Raises:
            ValueError: the budget is under the floor.
        """
        chosen, settings = VARIANTS[variant], self.settings
        prune = {**self.size.prune, **chosen.prune, "target_token_num": budget}
        adapts = not prune.get("train_pruners", True)
        if adapts:  # one training for all budgets
            prune["target_token_num"] = self.size.ablated
        if prune.get("enable_token_merger"):
            prune.setdefault("merger_tokens", self.size.vision_tokens // 4)
        config = PruneConfig.load(PRESET, prune)
        layers = json.loads((self.base / "config.json").read_text())["text_config"]["num_hidden_layers"]
        config.check_layers(layers)
        config.check_budget(config.merger_tokens if config.enable_token_merger else self.size.vision_tokens, layers)
        guided, flags = None, dict(chosen.flags)
        if chosen.start:
            # guidance does not see the budget: one training for all of them
            own = {**self.size.prune, "target_token_num": self.size.ablated}
            guided = self._job(
                f"guided, seed {seed}", seed, own, settings.guided_steps, settings.guided_batch_size, {}
            )
            flags["prune_start"] = guided.folder
        if config.guidance_only_ratio == 1 and not adapts:
            return Training(variant, budget, seed, guided, None, False, config.selection)
        if adapts:
            name, steps, batch_size = f"{variant}, seed {seed}", settings.adapted_steps, settings.adapted_batch_size
        else:
            name, steps, batch_size = f"{variant} at {budget:g}, seed {seed}", settings.steps, settings.batch_size
        job = self._job(name, seed, prune, steps, batch_size, flags)
        return Training(variant, budget, seed, job, guided, "lora_enable" in flags, config.selection)

    def adapted_baseline(self, method: str, budget: float, seed: int) -> Job:
        """LoRA adapted, as to pruners, to a training-free method at one budget."""
        prune, settings = {**self.size.prune, "target_token_num": budget}, self.settings
        flags = {**VARIANTS[ADAPTED].flags, "prune_baseline": method}
        name = f"{method}, {ADAPTED} at {budget:g}, seed {seed}"
        return self._job(name, seed, prune, settings.adapted_steps, settings.adapted_batch_size, flags)

    def _job(
        self, name: str, seed: int, prune: dict[str, Any], steps: int, batch_size: int, flags: dict[str, Any]
    ) -> Job:
        """The product's training command."""
        settled = {
            "prune_config": PRESET,
            "prune_compile_layers": self.settings.compile and "lora_enable" not in flags,
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "bf16": self.settings.bf16,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 30),
            "seed": seed,
            "logging_steps": max(1, steps // 80),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "model_max_length": 1024,
            **{f"prune_{name}": value for name, value in prune.items()},
            **flags,
        }
        config = PruneConfig.load(PRESET, prune).to_dict()
        key = digest(self.base_key, self.data.name, config, settled, sources(*TRAINING))
        out = self.folder / f"{prune['target_token_num']:g}-s{seed}-{key}"
        where = {
            "stack": "hf",
            "model_name_or_path": self.base,
            "data_path": self.data / "train.json",
            "image_folder": self.data,
            "output_dir": out,
            "dataloader_num_workers": self.settings.workers,
        }
        words = arguments({**where, **settled})
        return Job(name, out, ("-m", "llava_prune.train", *words), expected_failure=COLLAPSED)


def arguments(flags: dict[str, Any]) -> list[str]:
    """`--name value`, of a list `--name value value`."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    return words
