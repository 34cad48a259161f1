"""Fits: variants of the pruners that learn from the same unpruned passes again and again.

What guidance teaches does not change while pruners learn, so the passes are made once, and a fit takes seconds where a
training takes minutes. The base is asked about held-back pictures (`val`), and is right where each token of the answer
is the likeliest. The true slopes are ranked as well: a pruner that knew the answer. Nothing here is a result on the
test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...budget import UnreachableBudget
from ...config import PruneConfig
from ...guidance import guidance_of, lessons_of
from ...layout import IGNORE_INDEX
from ...patch import attach_pruners, prune_mode
from ...pruner import LayerPruner
from ...replay import Replay
from ...scoring import LayerView, Scores
from ..prepare import write_text
from .ablations import named
from .intervals import of_seeds
from .size import MiniSize
from .trainings import PRESET, arguments

ASKED_AT_ONCE = 64
ORIGIN, SLOPES = "origin", "true slopes"
WIDTH = 160  # of the table, at least


@dataclass(frozen=True)
class Fit:
    """What differs from the preset.

    Attributes:
        prune: `PruneConfig` fields.
        steps: optimizer steps.
        batch_size: remembered questions a step.
    """

    prune: dict[str, Any] = field(default_factory=dict)
    steps: int = 1500
    batch_size: int = 64


FITS = {
    "ours": Fit(),
    "longer": Fit(steps=6000),
    "large_batch": Fit({"pruner_lr": 2e-3}, batch_size=256),
    "wider": Fit({"pruner_rank": 384, "pruner_dim": 512}),
    "no_qk_norm": Fit({"pruner_qk_norm": False}),
    "no_question": Fit({"use_question": False}),
    "attn_residual": Fit({"use_attn_residual": True}),
    "equal_shares": Fit({"layer_shares": [1, 1, 1, 1]}),
    "layers_1_8_16_24": Fit({"pruning_layers": [1, 8, 16, 24]}),
    "layers_6_12_18": Fit({"pruning_layers": [6, 12, 18], "layer_shares": [1.5, 1, 0.5]}),
    "layers_1_13_25": Fit({"pruning_layers": [1, 13, 25], "layer_shares": [1.5, 1, 0.5]}),
    "layers_2_8_16": Fit({"pruning_layers": [2, 8, 16], "layer_shares": [1.5, 1, 0.5]}),
}


def chosen_fits(names: str) -> dict[str, Fit]:
    """Fits by name, see `named`."""
    return {name: FITS[name] for name in named(names, FITS, "--fit: no fit")}


class Fits:
    """The unpruned passes of one base, and what can be learned from them.

    Args:
        base, data: folders.
        out: folder of `fits.json`; exists.
        size: of the testbed.
        fits: by name; those whose layers the base does not have, or that no budget suits, are left out, with a
            message.
        samples: training questions to remember.
        asked: held-back questions.
        workers: processes that read pictures.

    Raises:
        ValueError: no fit is left.
    """

    def __init__(
        self,
        base: Path,
        data: Path,
        out: Path,
        size: MiniSize,
        fits: dict[str, Fit],
        samples: int,
        asked: int,
        workers: int,
    ):
        from ...train_hf import make_trainer

        self.out, self.size, self.fits = out, size, fits
        layers = json.loads((base / "config.json").read_text())["text_config"]["num_hidden_layers"]
        self.configs: dict[str, PruneConfig] = {}
        self.budgets: dict[str, list[float]] = {}
        for name, fit in fits.items():
            try:
                config = PruneConfig.load(PRESET, {**size.prune, **fit.prune, "target_token_num": size.ablated})
                config.check_layers(layers)
                self.budgets[name] = _reachable(config, size, layers)
                self.configs[name] = config
            except ValueError as error:
                print(f"{name} is left out: {error}")
        if not self.configs:
            raise ValueError("--fit: none of these fits has layers and a budget that this base can have")
        every = sorted({layer for config in self.configs.values() for layer in config.pruning_layers})
        gpu = torch.cuda.is_available()
        words = {
            "model_name_or_path": base,
            "data_path": data / "train.json",
            "image_folder": data,
            "output_dir": out / "fits",
            "prune_config": PRESET,
            "prune_compile_layers": gpu,
            "bf16": gpu,
            "per_device_train_batch_size": ASKED_AT_ONCE,
            "dataloader_num_workers": workers,
            "model_max_length": 1024,
            "report_to": "none",
            **{f"prune_{name}": value for name, value in size.prune.items()},
            "prune_pruning_layers": every,
            "prune_layer_shares": [1] * len(every),
            "prune_use_attn_residual": any(config.use_attn_residual for config in self.configs.values()),
            "prune_target_token_num": size.vision_tokens,
        }
        self.trainer = make_trainer(arguments(words))
        self.model = self.trainer.model.eval().requires_grad_(False)
        self.handle = self.trainer.prune_handle
        self.device = next(self.model.parameters()).device
        self.memory = Replay(samples)
        loader = self.trainer.get_train_dataloader()
        while len(self.memory) < samples:  # an epoch may be too short
            for batch in loader:
                self.memory.remember(self._lessons(batch))
                if len(self.memory) == samples:
                    break
        self.questions = [(batch, self._shares(batch)) for batch in self._asked(data, asked, workers)]
        self.handle.remove()

    def _asked(self, data: Path, number: int, workers: int) -> Iterator[dict[str, Tensor]]:
        from ...data_hf import ConversationDataset

        answers = [json.loads(line) for line in (data / "val_answers.jsonl").read_text().splitlines()]
        said = {line["question_id"]: line["answer"] for line in answers}
        samples = []
        for line in (data / "val.jsonl").read_text().splitlines()[:number]:
            asked = json.loads(line)
            turns = [
                {"from": "human", "value": f"<image>\n{asked['text']}"},
                {"from": "gpt", "value": said[asked["question_id"]]},
            ]
            samples.append({"id": asked["question_id"], "image": asked["image"], "conversations": turns})
        path = self.out / "fits_val.json"
        write_text(path, json.dumps(samples))
        dataset = ConversationDataset(str(path), str(data), self.trainer.processing_class, 1024)
        collate = self.trainer.data_collator
        yield from DataLoader(dataset, batch_size=ASKED_AT_ONCE, num_workers=workers, collate_fn=collate)

    # ---- unpruned passes

    def _lessons(self, batch: dict[str, Tensor]) -> dict:
        state = self.handle.state
        state.guided = state.prefix_only = True
        with torch.no_grad(), self._precision(), prune_mode(self.model, "soft"):
            self.model(**self._moved(batch), use_cache=False)
        state.guided = state.prefix_only = False
        return lessons_of(self.handle, self.model.get_output_embeddings(), state.record)

    def _shares(self, batch: dict[str, Tensor]) -> dict[int, Tensor]:
        return {layer: lesson.share for layer, lesson in self._lessons(batch).items()}

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def _precision(self) -> Any:
        return self.trainer.accelerator.autocast()

    # ---- learning and asking

    def fitted(self, fit: Fit, config: PruneConfig, seed: int) -> nn.ModuleDict:
        """Pruners by layer, fp32, that learned from what is remembered; as the trainer's AdamW with a cosine."""
        from transformers import get_cosine_schedule_with_warmup

        torch.manual_seed(seed)
        made = {str(layer): LayerPruner(self.handle.hidden_size, config) for layer in config.pruning_layers}
        pruners = nn.ModuleDict(made).to(self.device)
        optimizer = torch.optim.AdamW(
            pruners.parameters(), lr=config.pruner_lr, weight_decay=config.pruner_weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, fit.steps // 30), fit.steps)
        by_layer = {int(layer): pruner for layer, pruner in pruners.items()}
        for _ in range(fit.steps):
            lessons = self.memory.drawn(fit.batch_size, by_layer)
            if not config.use_attn_residual:  # other fits may
                lessons = {layer: lesson.without_attention() for layer, lesson in lessons.items()}
            with self._precision():
                loss = config.guidance_weight * guidance_of(by_layer, lessons, self.handle.config.compile_layers)
            loss.backward()
            nn.utils.clip_grad_norm_(pruners.parameters(), self.trainer.args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        return pruners

    @torch.no_grad()
    def right(self, config: PruneConfig, pruners: nn.ModuleDict | None, budget: float) -> float:
        """Share of the questions answered right at exactly `budget` average tokens, without pruners by true slopes."""
        with attach_pruners(self.model, config.with_budget(budget)) as handle:
            known = {layer: _Known() for layer in config.pruning_layers}
            if pruners is not None:
                handle.pruners.layers.load_state_dict(pruners.state_dict())
            else:
                with handle.suspended():
                    handle.scorers = known
            return self.answered("masked", known)

    def answered(self, mode: str, known: dict[int, _Known]) -> float:
        """Share of the questions answered right in a mode; `known` are the scorers to be told a batch's slopes."""
        hits = []
        for batch, shares in self.questions:
            for layer, scorer in known.items():
                scorer.share = shares[layer]
            batch = self._moved(batch)
            with self._precision(), prune_mode(self.model, mode):
                logits = self.model(**batch, use_cache=False).logits[:, :-1]
            answer = batch["labels"][:, 1:]
            hits.append(((logits.argmax(-1) == answer) | (answer == IGNORE_INDEX)).all(-1))
        return torch.cat(hits).float().mean().item()

    def run(self, seeds: Sequence[int] = (0,)) -> list[dict[str, Any]]:
        """Every fit at every budget above its floor; `fits.json` and a table.

        Returns:
            Rows of `fit`, `steps` and `right`: the share right of each seed by budget.
        """
        first = next(iter(self.configs.values()))
        with torch.no_grad(), attach_pruners(self.model, first):
            origin = self.answered("origin", {})
        rows: list[dict[str, Any]] = [{"fit": ORIGIN, "right": {str(at): [origin] for at in self.size.budgets}}]
        print(f"{ORIGIN}: {origin:.1%}", flush=True)
        layers: dict[tuple, str] = {}
        for name, config in self.configs.items():
            fit, places = self.fits[name], (config.pruning_layers, config.layer_shares)
            if places not in layers:
                layers[places] = f"{SLOPES}, {name}" if layers else SLOPES
                rows.append({"fit": layers[places], "right": self._at(config, self.budgets[name], [None])})
            fitted = self._not_lost(name, {seed: self.fitted(fit, config, seed) for seed in seeds})
            if not fitted:
                continue
            rows.append({"fit": name, "steps": fit.steps, "right": self._at(config, self.budgets[name], fitted)})
            shown = (f"{mean(shares):.1%} at {at}" for at, shares in rows[-1]["right"].items())
            print(f"{name}: " + ", ".join(shown), flush=True)
            write_text(self.out / "fits.json", json.dumps(rows, indent=1) + "\n")
        _print(rows, self.size.budgets)
        return rows

    @staticmethod
    def _not_lost(name: str, fitted: dict[int, nn.ModuleDict]) -> list[nn.ModuleDict]:
        """Those whose weights are finite; of the others a message says the seeds."""
        fine = {
            seed: pruners
            for seed, pruners in fitted.items()
            if all(weight.isfinite().all() for weight in pruners.parameters())
        }
        if lost := sorted(fitted.keys() - fine.keys()):
            print(f"{name}: left out, seeds {lost}: their weights are not finite any more", flush=True)
        return list(fine.values())

    def _at(
        self, config: PruneConfig, budgets: list[float], fitted: list[nn.ModuleDict | None]
    ) -> dict[str, list[float]]:
        return {str(at): [self.right(config, pruners, at) for pruners in fitted] for at in budgets}


def _reachable(config: PruneConfig, size: MiniSize, layers: int) -> list[float]:
    """Budgets that a config can have, at least one; raises ValueError if it can have none."""
    reachable = []
    for budget in size.budgets:
        try:
            config.with_budget(budget).check_budget(size.vision_tokens, layers)
            reachable.append(budget)
        except UnreachableBudget as error:
            refusal = error
    if not reachable:
        raise refusal
    return reachable


class _Known:
    """A scorer that is told the scores of the batch."""

    share: Tensor

    def __call__(self, view: LayerView) -> Scores:
        return Scores(self.share)


def _print(rows: list[dict[str, Any]], budgets: tuple[float, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-back questions answered right, by average tokens: mean [95 % interval] of the seeds")
    table.add_column("fit", no_wrap=True)
    for name in ("steps", *(f"{budget:g}" for budget in budgets)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shares = [row["right"].get(str(budget)) for budget in budgets]
        table.add_row(row["fit"], str(row.get("steps", "")), *(map(_shown, shares)))
    Console(width=max(Console().width, WIDTH)).print(table)


def _shown(shares: list[float] | None) -> str:
    if shares is None:
        return "floor"
    centre, low, high = of_seeds(shares)
    return f"{centre:.1%}" if len(shares) == 1 else f"{centre:.1%} [{low:.1%}, {high:.1%}]"
