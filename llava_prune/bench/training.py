"""One optimiser step of pruner training beside one of LoRA on the stock model, in the Hugging Face Trainer.

The same random batch, the same checkpointing and dtype, one process, no DeepSpeed. The step is timed from one to the
next, and its parts inside of it.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import IGNORE_INDEX
from ..patch import detach_pruners
from ..reporting.measure import Clock
from .inputs import random_batch

PARTS = ("fake forward", "real forward", "backward", "discriminator", "optimiser")
ANSWER = 16  # supervised tokens of a sample


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained, and how it is timed.

    Attributes:
        batch, text: samples of a step, and text tokens of each.
        checkpointing: gradient checkpointing.
        warmup, steps: optimiser steps thrown away, and timed.
        lora_rank: of the stock model's adapters, on every linear layer of the decoder as in LLaVA's own recipe.
        prune_config: preset or file of the pruners.
    """

    batch: int = 8
    text: int = 128
    checkpointing: bool = True
    warmup: int = 3
    steps: int = 10
    lora_rank: int = 128
    prune_config: str = "avg128"


@dataclass
class StepTimes:
    """Of one kind of training.

    Attributes:
        step_ms: median time from the end of one step to the end of the next.
        parts_ms: medians of the parts inside; the rest is data, logging and what the Trainer does.
        peak_bytes: highest memory, weights included; None on a CPU.
        loss: of the last step.
    """

    step_ms: float
    parts_ms: dict[str, float]
    peak_bytes: int | None
    loss: float


@dataclass
class Stopwatch:
    """Marks on the device's clock around parts of a step."""

    clock: Clock
    spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Any:
        """Time the block under a name."""
        start = self.clock.now()
        yield
        self.spans.setdefault(name, []).append((start, self.clock.now()))

    def around(self, name: str, function: Callable) -> Callable:
        """`function`, every call of which is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def medians(self, skip: int) -> dict[str, float]:
        """Milliseconds of each part, the first `skip` steps left out."""
        return {
            name: median(self.clock.milliseconds(*span) for span in spans[skip:]) for name, spans in self.spans.items()
        }


def compare_steps(model: nn.Module, settings: TrainingSettings) -> dict[str, StepTimes]:
    """`lora` and `pruners`; the model is left without either, its weights as they were."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from ..trainer import PruneTrainerMixin

    class PruneTrainer(PruneTrainerMixin, Trainer):
        pass

    rank = settings.lora_rank
    model.train().requires_grad_(False)
    names = [name for name, module in model.named_modules() if _adapted(name, module)]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    results = {"lora": _run(Trainer, adapted, settings)}
    del adapted
    _strip_lora(model)
    results["pruners"] = _run(PruneTrainer, model, settings)
    detach_pruners(model)
    model.eval()
    return results


def _adapted(name: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear and ".layers." in name and "language_model" in name


def _strip_lora(model: nn.Module) -> None:
    """Put the plain linear layers back where PEFT put its own."""
    from peft.tuners.lora import LoraLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, child.base_layer)
    model.__dict__.pop("peft_config", None)


def _run(trainer_class: type, model: nn.Module, settings: TrainingSettings) -> StepTimes:
    from ..train_hf import arguments_class

    device = model.get_input_embeddings().weight.device
    watch = Stopwatch(Clock(device))
    ends: list[Any] = []
    rows = _samples(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_class()(
            output_dir=folder,
            max_steps=settings.warmup + settings.steps,
            per_device_train_batch_size=settings.batch,
            gradient_checkpointing=settings.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=settings.warmup + settings.steps,
            dataloader_num_workers=0,
            prune_config=settings.prune_config,
            disable_tqdm=True,
        )
        trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=_collate)
        _watch(trainer, watch, ends)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        trainer.train()
        watch.clock.synchronise()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    steps = [watch.clock.milliseconds(*pair) for pair in zip(ends, ends[1:], strict=False)][settings.warmup - 1 :]
    (loss,) = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return StepTimes(median(steps), watch.medians(settings.warmup), peak, loss)


def _watch(trainer: Any, watch: Stopwatch, ends: list[Any]) -> None:
    """Time the parts of this one trainer, on the instance."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            ends_of_backward.append(watch.clock.now())

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            watch.spans.setdefault("optimiser", []).append((ends_of_backward[-1], watch.clock.now()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(watch.clock.now())

    ends_of_backward: list[Any] = []
    trainer.add_callback(Ends())
    trainer.accelerator.backward = watch.around("backward", trainer.accelerator.backward)
    model = trainer.model
    model.forward = watch.around("fake forward", model.forward)
    if hasattr(trainer, "prune_handle"):
        trainer._unpruned = watch.around("real forward", trainer._unpruned)
        trainer._train_adversary = watch.around("discriminator", trainer._train_adversary)


def _samples(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Tensor]]:
    """Enough random samples for every step, the last tokens of each supervised."""
    number = settings.batch * (settings.warmup + settings.steps)
    batch = random_batch(model, settings.batch, 1, settings.text)
    ids = batch["input_ids"].cpu()
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    pixels = batch["pixel_values"].float().cpu()
    rows = [{"input_ids": i, "labels": n, "pixel_values": p} for i, n, p in zip(ids, labels, pixels, strict=True)]
    return [rows[place % len(rows)] for place in range(number)]


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def print_steps(results: dict[str, StepTimes], console: Any) -> None:
    """A row a part, the two trainings side by side."""
    from rich.table import Table

    lora, pruners = results["lora"], results["pruners"]
    table = Table(title="one optimiser step")
    for name in ("", "stock with LoRA", "pruners", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    rows = [("whole step, ms", lora.step_ms, pruners.step_ms)]
    rows += [(f"  {part}", lora.parts_ms.get(part), pruners.parts_ms.get(part)) for part in PARTS]
    if lora.peak_bytes is not None:
        rows.append(("peak memory, GiB", lora.peak_bytes / 2**30, pruners.peak_bytes / 2**30))
    for label, first, second in rows:
        cells = ["" if value is None else f"{value:.1f}" for value in (first, second)]
        table.add_row(label, *cells, f"{second / first:.2f}" if first and second else "")
    console.print(table)
