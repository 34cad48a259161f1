"""Cells of a comparison: a method at a budget, and the file that its result is kept in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import METHODS, attach_baseline
from ..checkpoint import CONFIG, WEIGHTS, read_description, write_atomically
from ..method import attach_method
from ..patch import PruneHandle

ORIGIN, BASELINE, PRUNERS = "origin", "baseline", "pruners"


@dataclass(frozen=True)
class Method:
    """What keeps vision tokens.

    Attributes:
        name: as shown; of a baseline one of `METHODS`.
        kind: `origin`, `baseline` or `pruners`.
        directory: of trained pruners.
        settings: of a baseline's class.
        allow_other_base: as for `load_pruners`.
    """

    name: str
    kind: str
    directory: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    allow_other_base: bool = False

    def attach(self, model: nn.Module, budget: float | None) -> PruneHandle:
        """Put the method on `model`, in mode hard (origin: in mode origin).

        Args:
            budget: average tokens; None for origin, and for pruners that select as they were trained to.

        Raises:
            UnreachableBudget: the budget is under the method's floor.
            ValueError, FileNotFoundError: as `attach_baseline` and `attach_method`.
        """
        if self.kind == BASELINE:
            return attach_baseline(model, self.name, budget, **self.settings)
        mode = "origin" if self.kind == ORIGIN else "hard"
        options = {"average_tokens": budget, "allow_other_base": self.allow_other_base}
        return attach_method(model, self.directory, mode, **options)

    def keeps_exactly(self, budgets: list[float]) -> bool:
        """Whether pruners were trained to keep exactly one of `budgets`, so that their own choice is nothing new."""
        config = read_description(self.directory)["prune_config"]
        return config.get("selection") == "topk" and config.get("target_token_num") in budgets

    def identity(self) -> dict[str, Any]:
        """What the method computes with: of pruners the files' content, whatever they are called."""
        if self.kind != PRUNERS:
            return {"method": self.name, "settings": self.settings}
        files = [(self.directory / name).read_bytes() for name in (WEIGHTS, CONFIG)]
        return {"pruners": [hashlib.sha256(content).hexdigest() for content in files]}


@dataclass(frozen=True)
class Cell:
    """A method at a budget, None as for `Method.attach`."""

    method: Method
    budget: float | None

    @property
    def title(self) -> str:
        """For progress and messages."""
        if self.method.kind == ORIGIN:
            return ORIGIN
        return f"{self.method.name}, {budget_name(self.budget)}"


def budget_name(budget: float | None) -> str:
    """A budget in words; None is that of the pruners' own threshold."""
    return "own budget" if budget is None else f"{budget:g} tokens"


def plan(
    baselines: list[str], pruners: dict[str, Path], budgets: list[float], seed: int = 0, allow_other_base: bool = False
) -> list[Cell]:
    """All cells, origin first: baselines and pruners at every budget, then pruners at their own if it is another.

    Args:
        seed: of the baseline random.
        allow_other_base: as for `load_pruners`.
    """
    methods = [Method(name, BASELINE, settings={"seed": seed} if name == "random" else {}) for name in baselines]
    trained = [Method(name, PRUNERS, path, allow_other_base=allow_other_base) for name, path in pruners.items()]
    cells = [Cell(method, budget) for budget in budgets for method in (*methods, *trained)]
    own = [Cell(method, None) for method in trained if not method.keeps_exactly(budgets)]
    return [Cell(Method(ORIGIN, ORIGIN), None), *cells, *own]


class CellFiles:
    """Results in a folder, a JSON file a cell, found again as long as all that determines them is the same.

    Args:
        folder: made if need be.
        inputs: all that determines the result of every cell: model, questions, settings.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.inputs = folder, inputs

    def _key(self, cell: Cell) -> dict[str, Any]:
        return {**self.inputs, **cell.method.identity(), "budget": cell.budget}

    def path(self, cell: Cell) -> Path:
        """Where the result is or goes: method and budget to be read, a hash of all that determines it."""
        digest = hashlib.sha256(json.dumps(self._key(cell), sort_keys=True).encode()).hexdigest()
        method = PRUNERS if cell.method.kind == PRUNERS else cell.method.name
        budget = "own" if cell.budget is None else f"{cell.budget:g}"
        return self.folder / f"{method}-{budget}-{digest[:16]}.json"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """The finished result, or None; raises ValueError for a file that is not of this program."""
        path = self.path(cell)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())["result"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, and its cell is run again") from error

    def save(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write the result at once, so that a kill leaves the whole file or none."""
        text = json.dumps({"key": self._key(cell), "result": result}) + "\n"
        write_atomically(self.path(cell), lambda path: path.write_text(text))


def parse_pruners(texts: list[str]) -> dict[str, Path]:
    """`NAME=DIR` or `DIR` (called by its last part) by name; raises ValueError for a name that is taken."""
    found: dict[str, Path] = {}
    for text in texts:
        name, mark, directory = text.partition("=")
        if not mark or Path(text).is_dir():
            directory, name = text, Path(text).resolve().name
        if not name or not directory:
            raise ValueError(f"--pruners {text!r}: give NAME=DIR or DIR")
        if name in (*METHODS, ORIGIN, *found):
            raise ValueError(f"--pruners: the name {name!r} is taken, give another as NAME={directory}")
        found[name] = Path(directory)
    return found
