"""What every harness adds to its model's arguments, and what it says at the end of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..method import attach_method
from ..report import last_report
from ..sidecar import Sidecar, samples_of
from ..state import PruneState

# names in `--model_args` and in VLMEvalKit's partial(...), with their defaults; `report` is a file for `Sidecar`
DEFAULTS: dict[str, Any] = {
    "pruners": None,
    "baseline": None,
    "mode": "hard",
    "average_tokens": None,
    "allow_other_base": False,
    "report": None,
}


def take_arguments(keywords: dict[str, Any]) -> dict[str, Any]:
    """Our arguments, removed from `keywords`; what was not given has its default."""
    return {name: keywords.pop(name, default) for name, default in DEFAULTS.items()}


class KeptTokens:
    """Attaches what the arguments ask for, and counts the tokens of every `model.generate` call.

    Args:
        model: a LLaVA model without pruners.
        arguments: as `take_arguments` returns them.
        rank: of this process; each but the first has a report of its own, `FILE.rank1` and so on.

    Raises:
        ValueError, FileNotFoundError: as `attach_method`.
    """

    def __init__(self, model: nn.Module, arguments: dict[str, Any], rank: int = 0):
        report = arguments["report"]
        given = {name: value for name, value in arguments.items() if name != "report"}
        self.model = model
        self.state: PruneState = attach_method(model, **given).state
        if report:
            Sidecar(model, f"{report}.rank{rank}" if rank else report)
        self.average_tokens: list[float] = []
        self.vision_tokens: list[int] = []
        self._generate = model.generate
        model.generate = self._counted_generate

    def _counted_generate(self, *args: Any, **kwargs: Any) -> Any:
        before = self.state.record  # a chat goes on with it
        output = self._generate(*args, **kwargs)
        if self.state.record is not None and self.state.record is not before:  # else there was no new image
            report = last_report(self.model).of_samples(samples_of(args, kwargs, output))
            seen = report.vision_tokens > 0
            self.average_tokens += report.average_tokens[seen].tolist()
            self.vision_tokens += report.vision_tokens[seen].tolist()
        return output

    def summary(self) -> str:
        """One line: how many vision tokens were kept."""
        if not self.average_tokens:
            return f"llava_prune: mode {self.state.mode}, no sample with an image yet"
        count = len(self.average_tokens)
        return (
            f"llava_prune: mode {self.state.mode}, {sum(self.average_tokens) / count:.1f} average tokens of "
            f"{sum(self.vision_tokens) / count:.1f} over {count} samples"
        )
