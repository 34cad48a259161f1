"""Running a cell: every question answered, what was kept counted, and the prefill timed on a few of the questions."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..budget import UnreachableBudget
from ..patch import PruneHandle
from ..report import last_report, llm_flops
from ..reporting.measure import measure, percentile
from ..reporting.samples import make_batches
from ..version import __version__
from ..visualize.chat import Chat
from .cells import BASELINE, ORIGIN, Cell, CellFiles
from .prepared import PreparedBatches
from .questions import Question, fingerprint

FIGURES = 2  # version of what is noted of a question
TIMES = ("prefill", "first_token")  # of `reporting.measure`


@dataclass(frozen=True)
class Settings:
    """How questions are asked and timed.

    Attributes:
        batch_size: questions answered at once; timed are single questions.
        max_new_tokens: longest answer.
        timed: questions that are timed, the first ones; 0 times nothing.
        warmup: calls of each timed question and mode that are thrown away.
        repeats: timed calls of each question and mode.
    """

    batch_size: int = 1
    max_new_tokens: int = 128
    timed: int = 4
    warmup: int = 2
    repeats: int = 5


def inputs_of(chat: Chat, questions: list[Question], settings: Settings) -> dict[str, Any]:
    """All that determines a cell beside its method and budget. `chat.model` must be without pruners."""
    import transformers

    model = chat.model
    device = next(model.parameters()).device
    threads = f"cpu, threads: {torch.get_num_threads()}"
    (first,) = make_batches(chat.inputs, [questions[0].sample()], 1, 0)
    return {
        "versions": [__version__, torch.__version__, transformers.__version__, FIGURES],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "attention": compat.attention_backend(compat.find_decoder(model)),
        "model": _hash_of(model.state_dict(), *_configurations(model)),
        "prompt": _hash_of({name: value for name, value in first.items() if isinstance(value, Tensor)}),
        "questions": fingerprint(questions),
        **asdict(settings),
    }


def _configurations(model: nn.Module) -> list[dict[str, Any]]:
    """The model's settings without where it was found."""
    paths = ("_name_or_path", "mm_vision_tower")
    config = {name: value for name, value in model.config.to_dict().items() if name not in paths}
    return [config, model.generation_config.to_dict()]


def _hash_of(tensors: dict[str, Tensor], *values: Any) -> str:
    """Hash of the tensors' bytes and of plain values."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_cells(
    chat: Chat, cells: list[Cell], files: CellFiles, questions: list[Question], settings: Settings
) -> list[dict[str, Any]]:
    """The result of every cell, run if it is not among the files."""
    from tqdm import tqdm

    prepared = PreparedBatches(chat, questions, settings.batch_size)
    results = [files.load(cell) for cell in cells]
    missing = [place for place, result in enumerate(results) if result is None]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before")
    with tqdm(missing, unit="cell", disable=None) as progress:
        for place in progress:
            cell = cells[place]
            progress.set_description(cell.title)
            result = results[place] = run_cell(chat, cell, questions, settings, prepared)
            files.save(cell, result)
            progress.write(f"{cell.title}: {result['reason'] or '{:.0f} s'.format(result['seconds'])}")
    return results


def run_cell(
    chat: Chat, cell: Cell, questions: list[Question], settings: Settings, prepared: PreparedBatches | None = None
) -> dict[str, Any]:
    """Attach the method, ask everything, time a few, and take it off again.

    Args:
        prepared: the questions as batches, from an earlier cell; None makes them.

    Returns:
        `reason`, why the cell is empty, or None and then `questions`, one entry each with `question_id`, `answer`,
        `tokens_per_layer` and `llm_flops` (of the prefill, the method's own included); `times_ms`, for each of `TIMES`
        the medians of `origin` and of `hard`, which took turns (empty if nothing is timed); `seconds` in all.

    Raises:
        ValueError: the pruners do not fit the model.
    """
    start = time.perf_counter()
    try:
        handle = cell.method.attach(chat.model, cell.budget)
    except UnreachableBudget as error:
        return {"reason": str(error)}
    except ValueError as error:
        if cell.method.kind != BASELINE:
            raise
        return {"reason": str(error)}  # the model does not suit the method
    with handle:
        try:
            answered = _answer(
                chat, handle, prepared or PreparedBatches(chat, questions, settings.batch_size), settings
            )
        except UnreachableBudget as error:  # where vision tokens differ, a floor is known by sample
            return {"reason": str(error)}
        modes = ["origin"] if cell.method.kind == ORIGIN else ["origin", "hard"]
        times = _time(chat, handle, modes, questions[: settings.timed], settings)
    return {"reason": None, "questions": answered, "times_ms": times, "seconds": time.perf_counter() - start}


def _answer(chat: Chat, handle: PruneHandle, prepared: PreparedBatches, settings: Settings) -> list[dict[str, Any]]:
    from tqdm import tqdm

    answered = []
    with tqdm(unit="question", disable=None, leave=False) as progress:
        for asked, batch in prepared:
            answers = chat.answers_to(batch, settings.max_new_tokens)
            report = last_report(chat.model)
            flops = llm_flops(handle, report, handle.state.mode != "origin")
            figures = zip(asked, answers, report.tokens_per_layer.tolist(), flops.tolist(), strict=True)
            answered += [
                {"question_id": question.id, "answer": answer, "tokens_per_layer": tokens, "llm_flops": count}
                for question, answer, tokens, count in figures
            ]
            progress.update(len(asked))
    return answered


def _time(
    chat: Chat, handle: PruneHandle, modes: list[str], questions: list[Question], settings: Settings
) -> dict[str, dict[str, float]]:
    if not questions:
        return {}
    batches = make_batches(chat.inputs, [question.sample() for question in questions], 1, 0)
    measured = measure(handle, modes, batches, 2, settings.warmup, settings.repeats)
    return {name: {mode: percentile(measured[mode].times[name], 50) for mode in modes} for name in TIMES}
