"""Reading the training data once before any model is loaded, so that a bad file costs seconds and not hours."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHOWN = 5  # problems named in a message


def check_training_data(data_path: str, image_folder: str | None) -> int:
    """Check LLaVA conversation JSON and its images (each file is opened and its header read, not decoded).

    Args:
        data_path: a JSON list of `{"id", "image" (optional), "conversations": [{"from", "value"}, ..]}`.
        image_folder: what image paths are relative to.

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
        problems = [p for p in pool.map(lambda item: _problem(*item, image_folder), enumerate(samples)) if p]
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{len(problems)} of {len(samples)} samples of {data_path} can not be used; repair or remove them:\n  "
            + "\n  ".join(problems[:SHOWN])
            + more
        )
    return len(samples)


def _problem(index: int, sample: Any, image_folder: str | None) -> str | None:
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
    if not any(turn["from"] == "gpt" for turn in turns):
        return f"{name}: no answer (a turn from 'gpt')"
    asked = sum(str(turn["value"]).count("<image>") for turn in turns)
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
    except (OSError, ValueError) as error:
        return f"{name}: image {path} can not be read ({error})"


class NamedErrors:
    """LLaVA's dataset as it is, except that an image that can not be decoded is named in the error."""

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
        except OSError as error:
            sample = self.dataset.list_data_dict[index]
            raise ValueError(
                f"sample {index} (id {sample.get('id')!r}): image {sample.get('image')!r} can not be decoded ({error})"
                ". Repair or remove it and start the same command again: it resumes from the last checkpoint"
            ) from error
