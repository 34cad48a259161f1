"""`compare` on the hf stack: the same command over Hugging Face's classes, one question at a time and in batches."""

import csv
import json

import pytest
from reference import FOLDER, pictures

from llava_prune.baselines import METHODS
from llava_prune.comparing.cells import plan
from llava_prune.comparing.command import main
from llava_prune.comparing.prepared import PreparedBatches
from llava_prune.comparing.questions import Question, read_questions
from llava_prune.comparing.runner import Settings, run_cell
from llava_prune.convert import main as convert
from llava_prune.testbed.install import install_base
from llava_prune.visualize.chat import load_chat

TEXTS = ["What color is the shape in the top left?", "Is there a circle?", "How many red shapes do you see in here?"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The converted testbed base and three questions, of different lengths about pictures of different shapes."""
    folder = tmp_path_factory.mktemp("compare")
    convert(["--model", str(install_base(folder)), "--out", str(folder / "hf")])
    asked, answers = [], []
    for number, (picture, text) in enumerate(zip(pictures(), TEXTS, strict=True)):
        picture.save(folder / f"{number}.png")
        asked.append({"question_id": number, "image": f"{number}.png", "text": text})
        answers.append({"question_id": number, "answer": "yes"})
    for name, lines in (("asked", asked), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_command_writes_its_files_and_goes_on_where_it_was(data, tmp_path, capsys):
    words = ["--model", data / "hf", "--pruners", f"ours={FOLDER / 'pruners'}", "--methods", "uniform,fastv"]
    words += ["--question-file", data / "asked.jsonl", "--image-folder", data, "--answers", data / "answers.jsonl"]
    words += ["--budgets", "48,30", "--max_new_tokens", 4, "--timed", 1, "--repeats", 1, "--out", tmp_path]
    main([str(word) for word in words])
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows if row["reason"]] == ["fastv", "ours"] and len(rows) == 8
    kept = {(row["method"], row["budget"]): row["average_tokens"] for row in rows if not row["reason"]}
    assert float(kept["origin", ""]) == 144 and float(kept["uniform", "48.0"]) == 48
    assert 47 < float(kept["ours", "48.0"]) <= 48 and (tmp_path / "compare.png").stat().st_size > 10_000
    assert all(float(row["prefill_ms"]) > 0 for row in rows if not row["reason"])
    capsys.readouterr()
    main([str(word) for word in words])
    assert "8 cells, 8 of them finished before" in capsys.readouterr().out


def test_answers_and_tokens_are_the_same_in_batches(data):
    chat = load_chat(str(data / "hf"), None, None, "v1")
    questions = read_questions(data / "asked.jsonl", data, data / "answers.jsonl", None)
    for cell in plan(list(METHODS), {"ours": FOLDER / "pruners"}, [48.0]):
        one, many = (
            run_cell(chat, cell, questions, Settings(batch_size=size, max_new_tokens=4, timed=0)) for size in (1, 3)
        )
        assert one["questions"] == many["questions"], cell.title


def test_pictures_are_prepared_once_as_far_as_memory_allows(data, monkeypatch):
    chat = load_chat(str(data / "hf"), None, None, "v1")
    questions = read_questions(data / "asked.jsonl", data, data / "answers.jsonl", None)
    opened, sample = [], Question.sample
    monkeypatch.setattr(Question, "sample", lambda question: opened.append(question.id) or sample(question))
    settings = Settings(batch_size=2, max_new_tokens=4, timed=0)
    cells = plan(["uniform", "fastv"], {}, [48.0])
    answers = [run_cell(chat, cell, questions, settings)["questions"] for cell in cells]
    first = 2 * 3 * 192**2 * 4 + 50_000  # pixels and words of the first batch, and no room for the second
    for memory, openings in ((2**30, [1, 1, 1]), (first, [1, 1, 3]), (0, [3, 3, 3])):
        del opened[:]
        prepared = PreparedBatches(chat, questions, 2, memory)
        for cell, expected in zip(cells, answers, strict=True):
            assert run_cell(chat, cell, questions, settings, prepared)["questions"] == expected, cell.title
        assert [opened.count(question.id) for question in questions] == openings
