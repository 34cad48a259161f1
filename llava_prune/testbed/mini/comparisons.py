"""Comparisons of mini: the product's `compare` on a question set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jobs import Job
from .keys import COMPARING, digest, sources
from .trainings import Training

LONGEST_ANSWER = 8  # tokens; the longest word of a question has 3
BATCH_SIZE = 64


@dataclass(frozen=True)
class Comparison:
    """One run of `compare`.

    Attributes:
        job: the command.
        trainings: whose pruners are in it, by the name that they have there.
    """

    job: Job
    trainings: dict[str, Training]

    def rows(self) -> list[dict[str, Any]]:
        """As in `compare.json`."""
        return json.loads((self.job.folder / "compare.json").read_text())["rows"]


def plan_comparison(
    folder: Path,
    model: Path,
    data: Path,
    name: str,
    questions: str,
    trainings: list[Training],
    methods: str,
    budgets: tuple[float, ...],
    number: int | None = None,
    timed: int = 0,
) -> Comparison:
    """Methods and pruners at some budgets on one set of questions; comparisons share what they find.

    Args:
        folder: of all comparisons.
        model: the base, or an adapter's folder.
        data: as `write_data` wrote it.
        name: as shown.
        questions: name of the set.
        trainings: finished ones.
        methods: as for `compare`.
        number: only the first so many questions.
        timed: questions whose prefill is timed.
    """
    named = {f"{training.variant}-s{training.seed}": training for training in trainings}
    keys = [training.job.folder.name for training in trainings]
    what = [model.name, data.name, questions, keys, methods, budgets, number, timed, sources(*COMPARING)]
    out = folder / f"{questions}-{'-'.join(f'{budget:g}' for budget in budgets)}-{digest(*what)}"
    words = ["compare", "--model", model, "--stack", "hf", "--methods", methods]
    words += ["--budgets", ",".join(f"{budget:g}" for budget in budgets)]
    words += ["--question-file", data / f"{questions}.jsonl", "--answers", data / f"{questions}_answers.jsonl"]
    words += ["--image-folder", data, "--batch_size", BATCH_SIZE, "--max_new_tokens", LONGEST_ANSWER, "--out", out]
    words += ["--timed", timed, "--warmup", 1, "--repeats", 3]
    words += ["--cells", folder / f"cells-{sources(*COMPARING)}"]
    if number is not None:
        words += ["--number", number]
    for label, training in named.items():
        words += ["--pruners", f"{label}={training.job.folder}"]
    return Comparison(Job(name, out, ("-m", "llava_prune", *map(str, words))), named)
