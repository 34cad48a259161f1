"""Trains mini's base as LLaVA is trained: first the projector, then projector and language model.

The projector learns on listings of what a picture shows (LLaVA's captions), then both on questions; the loss is on
the answers alone. The vision tower stays as it is, and so do the embeddings. Held-back pictures tell how it goes; the
test split is not touched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..base_data import paint_batch
from ..make_base import learning_rate
from ..pictures import load_pictures
from ..words import with_words
from .assemble import assemble, save
from .conversations import ALL_KINDS, Batch, Conversations, conversation_ids
from .data import HELD_BACK, held_back, plain_questions
from .pack import pack, read_packed, unpack, write_packed
from .size import MiniSize
from .trainee import Tiles, Trainee, compile_layers

TOWER_RATE = 0.2  # of the language model's learning rate


@dataclass(frozen=True)
class BaseTraining:
    """How the base is trained.

    Attributes:
        projector_steps, steps: optimizer steps of the two stages; about 5 minutes of an H100.
        batch_size: pictures a step.
        projector_lr, lr: peak learning rates of the two stages; in the second, the projector's is `lr` too.
        tune_tower: train the vision tower in the second stage.
        compile: use torch.compile; None where there is a GPU.
        seed: of weights and data.
        workers: processes that make conversations.
        checked: held-back batches asked at each report.
        report_seconds: between two reports.
    """

    projector_steps: int = 350
    steps: int = 3000
    batch_size: int = 32
    projector_lr: float = 2e-3
    lr: float = 5e-4
    tune_tower: bool = False
    compile: bool | None = None
    seed: int = 0
    workers: int = 6
    checked: int = 12
    report_seconds: float = 15.0


def train_base(folder: Path, size: MiniSize, settings: BaseTraining, pack_to: Path | None = None) -> dict[str, Any]:
    """Assemble, train and save the base to `folder`, which exists; `training.json` beside it tells how it went.

    Args:
        pack_to: a folder for the packed base; what is saved is then what it unpacks to.

    Returns:
        What is in `training.json`: `settings`, `log`, `seconds` of each part, `accuracy` on held-back pictures.

    Raises:
        OSError, ValueError, ImportError: a part can not be had.
    """
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = {"began": time.monotonic()}
    model, processor = assemble(size)
    opening, turn = conversation_ids(processor.tokenizer)
    clock["assembled"] = time.monotonic()
    plain = load_pictures("train")
    pictures = with_words(plain, "train")
    tiles = Tiles(pictures, len(plain.images), size, device)
    clock["pictures"] = time.monotonic()

    def stream(listings: bool, checked: bool) -> Conversations:
        groups = held_back(pictures.by_label(), checked)
        asked = [
            (i, plain.labels[i], turns)
            for i, turns in enumerate(plain_questions("train"))
            if turns and (i % HELD_BACK == 0) == checked
        ]
        seed = settings.seed + checked
        return Conversations(groups, asked, turn, size, settings.batch_size, listings, seed)

    initial = {name: value.clone() for name, value in model.state_dict().items()} if pack_to else {}
    run = _Run(model.to(device), processor, opening, tiles, size, settings, device)
    for stage, listings in (("projector", True), ("questions", False)):
        checks = list(islice(iter(stream(listings, True)), settings.checked))
        run.train(stage, stream(listings, False), [batch.to(device) for batch in checks])
        clock[stage] = time.monotonic()
    run.trainee.fold()
    if pack_to is not None:
        packed = pack(initial, model.state_dict())
        write_packed(packed, pack_to)
        model.load_state_dict(unpack(initial, packed))
        run.report("packed", 0, 0.0, None, 0.0, [batch.to(device) for batch in checks])
        clock["packed"] = time.monotonic()
    save(model, processor, folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
    clock["saved"] = time.monotonic()
    names, times = list(clock), list(clock.values())
    seconds = {name: round(end - start, 1) for name, start, end in zip(names[1:], times, times[1:], strict=False)}
    result = {"settings": asdict(settings), "seconds": seconds, "accuracy": run.log[-1]["accuracy"], "log": run.log}
    (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def unpack_base(folder: Path, size: MiniSize, packed: Path, seed: int) -> None:
    """Save the base that was packed to `packed` to `folder`, which exists; `seed` is that of its random parts.

    Raises:
        OSError, ValueError, ImportError: a part can not be had, or the packed base is none or of another model.
    """
    torch.manual_seed(seed)
    model, processor = assemble(size)
    model.load_state_dict(unpack(model.state_dict(), read_packed(packed)))
    save(model, processor, folder, torch.bfloat16 if torch.cuda.is_available() else torch.float32)


class _Run:
    """The loop of both stages."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        opening: list[int],
        tiles: Tiles,
        size: MiniSize,
        settings: BaseTraining,
        device: torch.device,
    ):
        self.trainee = Trainee(model, opening, settings.tune_tower).to(device)
        self.model, self.images, self.tiles = model, processor.image_processor, tiles
        self.size, self.settings, self.device = size, settings, device
        self.log: list[dict[str, Any]] = []
        if settings.compile if settings.compile is not None else device.type == "cuda":
            compile_layers(model)

    def train(self, stage: str, stream: Conversations, checks: list[Batch]) -> None:
        """One stage; a line in `log` now and then."""
        settings = self.settings
        optimizer = self._optimizer(stage)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        steps = settings.projector_steps if stage == "projector" else settings.steps
        batches = self._loader(stream)
        first = next(batches).to(self.device)
        if stage == "projector":
            self.trainee.standardise(self._pixels(first, flip=False))
        # whatever is compiled or allocated once comes before the clock starts
        self._loss(first).backward()
        optimizer.zero_grad(set_to_none=True)
        self.report(stage, 0, 0.0, None, 0.0, checks)
        began = reported = time.monotonic()
        step, before, loss = 0, 0, None
        while True:
            now = time.monotonic()
            if now - reported >= settings.report_seconds or step == steps:
                rate = (step - before) / (now - reported)
                self.report(stage, step, now - began, loss, rate, checks)
                reported, before = time.monotonic(), step
            if step == steps:
                return
            loss = self._loss(next(batches).to(self.device))
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            logits = self.trainee(self._pixels(batch, flip=True), batch.ids, batch.places)
            return self.trainee.loss(logits, batch)

    def _optimizer(self, stage: str) -> torch.optim.Optimizer:
        core = self.model.model
        self.model.requires_grad_(False)
        groups = [
            (core.multi_modal_projector, self.settings.projector_lr if stage == "projector" else self.settings.lr)
        ]
        if stage != "projector":
            groups += [(core.language_model.layers, self.settings.lr), (core.language_model.norm, self.settings.lr)]
            if self.settings.tune_tower:
                groups.append((core.vision_tower, self.settings.lr * TOWER_RATE))
        self.trainee.tune_tower = stage != "projector" and self.settings.tune_tower
        parameters = [
            {"params": list(module.requires_grad_(True).parameters()), "peak": peak} for module, peak in groups
        ]
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)

    def _loader(self, stream: Conversations) -> Iterator[Batch]:
        workers = self.settings.workers
        return iter(
            DataLoader(
                stream,
                batch_size=None,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                prefetch_factor=8 if workers else None,
            )
        )

    def _pixels(self, batch: Batch, flip: bool) -> torch.Tensor:
        images = self.tiles.by_grid[batch.grid]
        return paint_batch(images, batch.cells, self.images, flip, batch.grid, self.size.pixels, self.tiles.mirrored)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def report(
        self, stage: str, step: int, seconds: float, loss: torch.Tensor | None, rate: float, checks: list[Batch]
    ) -> None:
        """A line of the log."""
        right, kinds = [], []
        for batch in checks:
            with self._autocast():
                logits = self.trainee(self._pixels(batch, flip=False), batch.ids, batch.places)
            right.append(self.trainee.right(logits, batch))
            kinds.append(batch.kinds)
        right, kinds = torch.cat(right).float(), torch.cat(kinds)
        accuracy = {"all": right.mean().item()}
        accuracy |= {
            name: right[kinds == index].mean().item() for index, name in enumerate(ALL_KINDS) if (kinds == index).any()
        }
        line = {
            "stage": stage,
            "step": step,
            "seconds": round(seconds, 1),
            "steps_per_second": round(rate, 2),
            "loss": None if loss is None else round(loss.item(), 4),
            "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        }
        self.log.append(line)
        print(json.dumps(line), flush=True)
