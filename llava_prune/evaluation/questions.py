"""Question files of LLaVA's benchmarks, and whether an answers file answers them.

    python -m llava_prune.evaluation.questions FILE --chunks 8

prints how many chunks LLaVA really makes of 8: it cuts by ceil(questions / chunks), so that few questions make fewer
chunks than asked, and the process of a chunk that is not there would fail.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple


class Question(NamedTuple):
    """A question's id and its prompt, None where LLaVA composes the prompt (ScienceQA, MMBench)."""

    id: Any
    prompt: str | None


def read_lines(path: str | Path, fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not JSON or lacks one of `fields`, with its number.
    """
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error}): was the run cut short?") from error
        if lacking := [field for field in fields if field not in line]:
            raise ValueError(f"{path}, line {number}, lacks {lacking}")
        lines.append(line)
    return lines


def read_questions(path: str | Path) -> list[Question]:
    """Questions in the order in which LLaVA asks them.

    Args:
        path: `.jsonl` (most benchmarks), `.json` (ScienceQA) or `.tsv` (MMBench).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not of its format, or no question in it.
    """
    path = Path(path)
    if path.suffix == ".tsv":
        import pandas

        questions = [Question(int(index), None) for index in pandas.read_table(path, usecols=["index"])["index"]]
    elif path.suffix == ".json":
        questions = [Question(sample["id"], None) for sample in json.loads(path.read_text(encoding="utf-8"))]
    else:
        questions = [Question(line["question_id"], line["text"]) for line in read_lines(path, ("question_id", "text"))]
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def check_answers(answers: list[dict[str, Any]], questions: list[Question], path: str | Path) -> None:
    """Raises ValueError unless `answers` answers every question once, in their order.

    Ids alone would not do: TextVQA gives the questions about one image the same id.
    """
    for number, (answer, question) in enumerate(zip(answers, questions, strict=False), start=1):
        if answer["question_id"] != question.id or question.prompt not in (None, answer["prompt"]):
            raise ValueError(
                f"{path}, line {number}, answers question {answer['question_id']!r}, and question {question.id!r} is "
                "next: the answers are of another question file, or out of order; answer again"
            )
    if len(answers) != len(questions):
        raise ValueError(f"{path} holds {len(answers)} answers to {len(questions)} questions: answer again")


def read_answers(path: str | Path, question_file: str | Path) -> list[dict[str, Any]]:
    """The answers in `path`, one to each question of `question_file`; raises ValueError if they are not."""
    answers = read_lines(path, ("question_id", "prompt", "text"))
    check_answers(answers, read_questions(question_file), path)
    return answers


def chunk_count(questions: int, asked: int) -> int:
    """Chunks that LLaVA cuts `questions` into when asked for `asked`; asked for this many, it makes this many."""
    return math.ceil(questions / math.ceil(questions / asked))


def main() -> None:
    """Print the number of chunks."""
    parser = argparse.ArgumentParser(description="How many chunks LLaVA makes of a question file")
    parser.add_argument("question_file", type=Path)
    parser.add_argument("--chunks", type=int, required=True, help="chunks asked for, one a GPU")
    args = parser.parse_args()
    print(chunk_count(len(read_questions(args.question_file)), args.chunks))


if __name__ == "__main__":
    main()
