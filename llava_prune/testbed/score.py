"""Marks an answers file written by LLaVA's `model_vqa_loader` or by this project's evaluation."""

import os
from collections import defaultdict

from ..evaluation.questions import read_lines


def score(answers: str | os.PathLike, truth: str | os.PathLike) -> dict:
    """Share of right answers.

    An answer is right if it equals the true one, letter case, outer spaces and a full stop at the end aside.

    Args:
        answers: JSON lines with `question_id` and `text`.
        truth: the `test_answers.jsonl` that `prepare` wrote.

    Returns:
        {"accuracy": ..., "questions": ..., "kinds": {kind: accuracy}}, accuracies in [0, 1].

    Raises:
        ValueError: `answers` misses a question, answers one twice, or answers one that `truth` does not hold; or a
            line is not JSON.
    """
    expected = _by_id(truth, ("answer", "kind"))
    given = _by_id(answers, ("text",))
    if unknown := sorted(given.keys() - expected.keys(), key=str):
        raise ValueError(f"{answers} answers {len(unknown)} questions that {truth} does not hold: {unknown[:5]}")
    if missing := sorted(expected.keys() - given.keys(), key=str):
        raise ValueError(f"{answers} lacks {len(missing)} of the {len(expected)} questions of {truth}: {missing[:5]}")
    if not expected:
        raise ValueError(f"{truth} holds no question")
    kinds = defaultdict(list)
    for question, line in expected.items():
        kinds[line["kind"]].append(normalised(given[question]["text"]) == normalised(line["answer"]))
    right = [mark for marks in kinds.values() for mark in marks]
    return {
        "accuracy": sum(right) / len(right),
        "questions": len(right),
        "kinds": {kind: sum(marks) / len(marks) for kind, marks in sorted(kinds.items())},
    }


def normalised(text: str) -> str:
    """Lower case, without outer spaces and a full stop at the end."""
    return text.strip().lower().removesuffix(".").strip()


def _by_id(path: str | os.PathLike, fields: tuple[str, ...]) -> dict:
    lines = {}
    for line in read_lines(path, ("question_id", *fields)):
        if line["question_id"] in lines:
            raise ValueError(f"{path} repeats question_id {line['question_id']!r}: one line a question")
        lines[line["question_id"]] = line
    return lines
