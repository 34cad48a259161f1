"""The steps of mini in their order, each done once for all that determines it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .ablations import ADAPTED, MAIN
from .base import BaseTraining, train_base, unpack_base
from .comparisons import Comparison, plan_comparison
from .data import RECORD, DataAmounts, transfer_sets, write_data
from .fits import Fit, Fits
from .jobs import Job, run_jobs
from .keys import BASE, DATA, content, digest, sources
from .pack import packed_files
from .packages import DINOV2, SMOLLM2
from .size import MiniSize
from .trainings import Training, Trainings, TrainingSettings

TIMED, TIMED_QUESTIONS = 2, 8  # questions of a timing, and of the comparison that it is part of


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        budgets: of the main table, average tokens.
        seeds: of the trainings.
        methods: as for `compare`.
        adapt_methods: baselines that LoRA is adapted to as well, at every budget.
        ablated: budget of ablations and transfer.
        variants: of the ablations, the main training first.
        jobs: processes at once.
        gpus: of this machine.
        pack: folder to pack a trained base to, or None.
        packed: folder of a packed base, which is taken instead of training one, or None.
    """

    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    methods: str
    adapt_methods: tuple[str, ...]
    ablated: float
    variants: tuple[str, ...]
    jobs: int
    gpus: int
    pack: Path | None = None
    packed: Path | None = None


class Mini:
    """One output folder.

    Args:
        out: absolute.
        size, base_training, settings, amounts, plan: what is made.
    """

    def __init__(
        self,
        out: Path,
        size: MiniSize,
        base_training: BaseTraining,
        settings: TrainingSettings,
        amounts: DataAmounts,
        plan: Plan,
    ):
        self.out, self.size, self.plan = out, size, plan
        self.base_training, self.settings, self.amounts = base_training, settings, amounts
        out.mkdir(parents=True, exist_ok=True)
        parts = [SMOLLM2.sha256, DINOV2.sha256] if size.real else []
        what: list[Any] = [asdict(size), parts, sources(*BASE)]
        if plan.packed is not None:
            what += [content(path) for path in packed_files(plan.packed)]
        else:
            what += [asdict(base_training), plan.pack is not None]
        self.base = out / f"base-{digest(*what)}"
        self.data = out / f"data-{digest(asdict(size), asdict(amounts), sources(*DATA))}"
        self.times: dict[str, float] = {}

    # ---- base and data

    def prepare(self) -> None:
        """Base and data, unless they are there; the data are written by another process while the base trains."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            written = None
            if not (self.data / RECORD).is_file():
                self.data.mkdir(exist_ok=True)
                written = pool.submit(write_data, self.data, self.size, self.amounts)
            if not self.base.is_dir():
                self._make_base()
            began = time.monotonic()
            if written is not None:
                written.result()
        self.times["waiting for data"] = time.monotonic() - began
        self.base_key = content(self.base / "model.safetensors")

    def _make_base(self) -> None:
        staging = self.out / ".base"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        if self.plan.packed is not None:
            unpack_base(staging, self.size, self.plan.packed, self.base_training.seed)
        else:
            result = train_base(staging, self.size, self.base_training, self.plan.pack)
            self.times |= {f"base: {name}": seconds for name, seconds in result["seconds"].items()}
            share = result["accuracy"]["all"]
            print(f"{self.base}: {share:.2%} of questions about held-back pictures are answered right", flush=True)
        staging.rename(self.base)

    # ---- trainings and comparisons

    @property
    def trainings(self) -> Trainings:
        """Of this base on these data."""
        return Trainings(self.out / "pruners", self.base, self.base_key, self.data, self.size, self.settings)

    def training(self, variant: str, budget: float, seed: int) -> Training:
        """Planned; raises ValueError as `Trainings.plan`."""
        return self.trainings.plan(variant, budget, seed)

    def train(self, trainings: list[Training], beside: Sequence[Job] = ()) -> None:
        """Those that have not been run, after what they start from, and what runs beside them; equal ones are one."""
        starts = {training.start.folder: training.start for training in trainings if training.start is not None}
        jobs = {training.job.folder: training.job for training in trainings}
        self._run("trainings to start from", list(starts.values()), self.plan.jobs)
        self._run("trainings", [*jobs.values(), *beside], self.plan.jobs)

    def comparison(self, name: str, questions: str, trainings: list[Training], **changes: Any) -> Comparison:
        """Planned; pruners that collapsed are left out."""
        finished = [training for training in trainings if not training.collapsed]
        settings = {"model": self.base, "methods": self.plan.methods, "budgets": (self.plan.ablated,), **changes}
        return plan_comparison(
            self.out / "compared", data=self.data, name=name, questions=questions, trainings=finished, **settings
        )

    def _run(self, what: str, jobs: list, parallel: int) -> None:
        began = time.monotonic()
        seconds = run_jobs(jobs, parallel, self.plan.gpus)
        if seconds:
            longest = max(seconds.values())
            print(f"{what}: {len(seconds)} run in {time.monotonic() - began:.0f} s, each at most {longest:.0f} s")
        self.times[what] = self.times.get(what, 0.0) + time.monotonic() - began

    def main_table(self, times: bool) -> None:
        """Pruners of every budget and seed against the baselines; `results.*` in the output folder."""
        from .results import write_results

        budgets, seeds = self.plan.budgets, self.plan.seeds
        trainings = {budget: [self.training(MAIN, budget, seed) for seed in seeds] for budget in budgets}
        adapted = self._adapted()
        baselines = [
            self.comparison(f"baselines at {budget:g}", "test", [], budgets=(budget,)).job
            for budget in (budgets if self.plan.methods != "none" else ())
        ]
        self.train([training for row in trainings.values() for training in row], baselines)
        compared = {
            budget: self.comparison(f"compare at {budget:g}", "test", row, budgets=(budget,))
            for budget, row in trainings.items()
        }
        others = {
            (method, budget): self.trainings.adapted_baseline(method, budget, seeds[0])
            for method in self.plan.adapt_methods
            for budget in budgets
        }
        meanwhile = [comparison.job for comparison in compared.values()]
        adaptations = [*(row.job for row in adapted), *others.values()]
        self._run("adaptations and comparisons", [*adaptations, *meanwhile], self.plan.jobs)
        with_lora = self._compare_adapted("test", adapted, methods="none", budgets=budgets)
        with_lora += [
            self.comparison(f"{job.name}, compared", "test", [], model=job.folder, methods=method, budgets=(budget,))
            for (method, budget), job in others.items()
        ]
        self._run("comparisons of adapted", [comparison.job for comparison in with_lora], self.plan.jobs)
        timings = {}
        if times:
            few = {"number": min(TIMED_QUESTIONS, self.amounts.questions), "timed": TIMED}
            for budget, row in trainings.items():
                one = [training for training in row if not training.collapsed][:1]
                timings[budget] = self.comparison(f"times at {budget:g}", "test", one, budgets=(budget,), **few)
            # one after the other: side by side they would time each other
            self._run("times", [comparison.job for comparison in timings.values()], 1)
        write_results(self.out, self.size, self.amounts.questions, trainings, compared, with_lora, timings)

    def _adapted(self) -> list[Training]:
        """Of every seed, unless there is to be no adapter."""
        seeds = self.plan.seeds if self.settings.adapted_steps else ()
        return [self.training(ADAPTED, self.plan.ablated, seed) for seed in seeds]

    def _compare_adapted(self, questions: str, adapted: list[Training], **settings: Any) -> list[Comparison]:
        """Planned; one for each adapter, which is a base of its own."""
        return [
            self.comparison(
                f"{row.variant}, seed {row.seed}, on {questions}", questions, [row], model=row.job.folder, **settings
            )
            for row in adapted
            if not row.collapsed
        ]

    def transfer(self) -> None:
        """The main pruners and their adapters, trained on one grid, on every other set; `transfer.*`."""
        from .results import write_transfer

        trainings = [self.training(MAIN, self.plan.ablated, seed) for seed in self.plan.seeds]
        adapted = self._adapted()
        self.train(trainings)
        self.train(adapted)
        sets = ["test", *transfer_sets(self.size)]
        compared = {name: self.comparison(f"compare on {name}", name, trainings) for name in sets}
        with_lora = {name: self._compare_adapted(name, adapted, methods="none") for name in sets}
        jobs = [row.job for name in sets for row in (compared[name], *with_lora[name])]
        self._run("transfer", jobs, self.plan.jobs)
        write_transfer(self.out, self.amounts.questions, compared, with_lora)

    def ablations(self) -> None:
        """Every variant at one budget, asked what is not the test; `ablations.*` in the output folder."""
        from .results import write_ablations

        trainings = {
            variant: [self.training(variant, self.plan.ablated, seed) for seed in self.plan.seeds]
            for variant in self.plan.variants
        }
        self.train([training for row in trainings.values() for training in row])
        compared: dict[str, list[Comparison]] = {}
        for variant, row in trainings.items():
            if row[0].lora:
                compared[variant] = self._compare_adapted("val", row, methods="none")
            elif all(training.collapsed for training in row):
                compared[variant] = []
            else:
                compared[variant] = [self.comparison(f"compare {variant}", "val", row, methods="none")]
        jobs = {comparison.job.folder: comparison.job for row in compared.values() for comparison in row}
        self._run("ablations", list(jobs.values()), self.plan.jobs)
        write_ablations(self.out, self.plan.ablated, trainings, compared)

    def fit(self, fits: dict[str, Fit], samples: int) -> None:
        """Fits of `samples` remembered questions, asked what is not the test; `fits.json` in the output folder."""
        began = time.monotonic()
        workers = self.settings.workers
        made = Fits(self.base, self.data, self.out, self.size, fits, samples, self.amounts.questions, workers)
        made.run(self.plan.seeds)
        self.times["fits"] = time.monotonic() - began

    # ---- where the time went

    def print_times(self) -> None:
        """A table of the steps of this call, and `times.json`."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="seconds of this call")
        table.add_column("step")
        table.add_column("s", justify="right")
        for name, seconds in self.times.items():
            table.add_row(name, f"{seconds:.1f}")
        table.add_row("all", f"{sum(self.times.values()):.1f}")
        Console().print(table)
        rounded = {name: round(value, 1) for name, value in self.times.items()}
        (self.out / "times.json").write_text(json.dumps(rounded, indent=1) + "\n")
