"""The questions of a comparison: LLaVA's question file, its pictures and the right answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.questions import read_lines
from ..reporting.samples import Sample
from ..testbed.score import normalised


@dataclass(frozen=True)
class Question:
    """One question about one picture, and its right answer."""

    id: Any
    text: str
    image: Path
    answer: str

    def sample(self) -> Sample:
        """The question with its picture opened."""
        from PIL import Image

        with Image.open(self.image) as picture:
            return Sample(picture.convert("RGB"), self.text)

    def is_right(self, answer: str) -> bool:
        """Whether `answer` equals the right one, letter case, outer spaces and a full stop at the end aside."""
        return normalised(answer) == normalised(self.answer)


def read_questions(question_file: Path, image_folder: Path, answers: Path, number: int | None) -> list[Question]:
    """The first `number` questions (all if None) with their answers, in the file's order.

    Args:
        question_file: LLaVA's JSON lines with `question_id`, `image` and `text`.
        image_folder: what `image` is relative to.
        answers: JSON lines with `question_id` and `answer`, a string, as `testbed.prepare` writes them.

    Raises:
        FileNotFoundError: a file or a picture is missing.
        ValueError: a line is not of its format, an id is there twice, a question has no answer, or there are too few.
    """
    asked = _by_id(question_file, ("image", "text"))
    known = _by_id(answers, ("answer",))
    if number is not None and number > len(asked):
        raise ValueError(f"{question_file} holds {len(asked)} questions, --number asks for {number}")
    questions = []
    for identity, line in list(asked.items())[:number]:
        if identity not in known:
            raise ValueError(f"{answers} has no answer to question {identity!r} of {question_file}")
        image = Path(image_folder) / line["image"]
        if not image.is_file():
            raise FileNotFoundError(f"no picture {image} of question {identity!r}: check --image-folder")
        questions.append(Question(identity, line["text"], image, known[identity]["answer"]))
    return questions


def fingerprint(questions: list[Question]) -> str:
    """Hash of the ids, the texts and the pictures; what is run does not depend on the right answers."""
    digest, pictures = hashlib.sha256(), {}
    for question in questions:
        if question.image not in pictures:
            pictures[question.image] = hashlib.sha256(question.image.read_bytes()).hexdigest()
        digest.update(json.dumps([question.id, question.text, pictures[question.image]]).encode())
    return digest.hexdigest()


def _by_id(path: Path, fields: tuple[str, ...]) -> dict[Any, dict[str, Any]]:
    """Lines of a JSON-lines file by their `question_id`; all of `fields` are strings."""
    lines: dict[Any, dict[str, Any]] = {}
    for line in read_lines(path, ("question_id", *fields)):
        identity = line["question_id"]
        if not isinstance(identity, str | int) or not all(isinstance(line[field], str) for field in fields):
            raise ValueError(
                f"{path}, question {identity!r}: {' and '.join(fields)} must be text, question_id text or a number"
            )
        if identity in lines:
            raise ValueError(f"{path} repeats question_id {identity!r}: one line a question")
        lines[identity] = line
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines
