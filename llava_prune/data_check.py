"""Reading the training data once before any model is loaded, so that a bad file costs seconds and not hours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHOWN = 5  # problems named in a message
ROLES = ("human", "gpt")

TurnsProblem = Callable[[list[Any]], str | None]  # what a host can not use in the roles of a sample's turns, or None


def in_turns(roles: list[Any]) -> str | None:
    """Of LLaVA's templates: they drop a first answer, then questions and answers must follow each other."""
    rest = roles[1:] if roles[0] == "gpt" else roles
    if unknown := _unknown_role(roles):
        return unknown
    if "gpt" not in rest:
        return "no question before the answer, from which LLaVA then learns nothing; put a turn from 'human' first"
    if any(role != ROLES[turn % 2] for turn, role in enumerate(rest)):
        return f"turns from {', '.join(roles)}; LLaVA takes 'human' and 'gpt' in turns, so join two in a row"
    return None


def question_first(roles: list[Any]) -> str | None:
    """Of chat templates: any order, but an answer has something before it."""
    if roles[0] == "gpt":
        return "begins with an answer; put a turn from 'human' first, or remove the answer"
    return _unknown_role(roles)


def _unknown_role(roles: list[Any]) -> str | None:
    unknown = [role for role in roles if role not in ROLES]
    return f"a turn from {unknown[0]!r}; only 'human' and 'gpt' are known, put its text into one" if unknown else None


def check_training_data(
    data_path: str, image_folder: str | None, turns_problem: TurnsProblem | None = in_turns
) -> int:
    """Check LLaVA conversation JSON and its images (each file is opened and its header read, not decoded).

    Args:
        data_path: a JSON list of `{"id", "image" (optional), "conversations": [{"from", "value"}, ..]}`.
        image_folder: what image paths are relative to.
        turns_problem: `in_turns` or `question_first`, as the host needs them; None where it takes all.

    Returns:
        The number of samples.

    Raises:
        ValueError: names the first problems and says what would be right.
    """
    try:
        samples = json.loads(Path(data_path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--data_path {data_path} can not be read as JSON ({error}): give LLaVA's conversation format"
        ) from error
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"--data_path {data_path} must hold a non-empty JSON list of samples")
    with ThreadPoolExecutor(16) as pool:
        problems = [
            p for p in pool.map(lambda item: _problem(*item, image_folder, turns_problem), enumerate(samples)) if p
        ]
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{len(problems)} of {len(samples)} samples of {data_path} can not be used; repair or remove them:\n  "
            + "\n  ".join(problems[:SHOWN])
            + more
        )
    return len(samples)


def _problem(index: int, sample: Any, image_folder: str | None, turns_problem: TurnsProblem | None) -> str | None:
    """What is wrong with one sample, or None."""
    name = f"sample {index}"
    if not isinstance(sample, dict):
        return f"{name}: not an object"
    name += f" (id {sample.get('id')!r})"
    turns = sample.get("conversations")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in turns)
    ):
        return f"{name}: 'conversations' must be a list of {{'from', 'value'}}"
    if not all(isinstance(turn["value"], str) for turn in turns):
        return f"{name}: a turn whose 'value' is no text; give a string, or remove the turn"
    roles = [turn["from"] for turn in turns]
    if "gpt" not in roles:
        return f"{name}: no answer (a turn from 'gpt')"
    if turns_problem is not None and (problem := turns_problem(roles)):
        return f"{name}: {problem}"
    asked = sum(turn["value"].count("<image>") for turn in turns)
    if "image" not in sample:
        return f"{name}: '<image>' in the text but no 'image'" if asked else None
    if asked != 1:
        return f"{name}: an image but {asked} times '<image>' in the text; LLaVA's dataset needs it once"
    return _image_problem(name, os.path.join(image_folder or "", str(sample["image"])))


def _image_problem(name: str, path: str) -> str | None:
    from PIL import Image

    try:
        with Image.open(path):
            return None
    except Exception as error:  # Pillow has many, as of pictures too large
        return f"{name}: image {path} can not be read ({error})"


class NamedErrors:
    """A dataset as it is, except that a sample that can not be used is named in the error."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.dataset[index]
        except Exception as error:  # of broken pictures Pillow raises SyntaxError, struct.error and others
            sample = self.dataset.list_data_dict[index]
            raise ValueError(
                f"sample {index} (id {sample.get('id')!r}, image {sample.get('image')!r}) can not be used "
                f"({type(error).__name__}: {error}). Mend that, or remove the sample, and start the same command "
                "again: it resumes from the last checkpoint"
            ) from error
