"""`python -m llava_prune compare` on the testbed: every cell once, resumed where it stopped, told apart by content."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from launch import ROOT, environment
from PIL import Image
from reference import FOLDER

from llava_prune.baselines import METHODS
from llava_prune.comparing import runner, table
from llava_prune.comparing.cells import CellFiles, parse_pruners, plan
from llava_prune.comparing.command import main
from llava_prune.comparing.questions import read_questions
from llava_prune.patch import find_handle
from llava_prune.visualize.chat import load_chat

PRUNERS = FOLDER / "pruners"  # random, for the testbed's model
NUMBER = 4


@pytest.fixture
def out(testbed, tmp_path):
    """An output folder in which the testbed was prepared before."""
    (tmp_path / "testbed").symlink_to(testbed)
    return tmp_path


@pytest.fixture
def ran(monkeypatch):
    """Titles of the cells that are run."""
    titles, run = [], runner.run_cell

    def counted(chat, cell, *rest):
        titles.append(cell.title)
        return run(chat, cell, *rest)

    monkeypatch.setattr(runner, "run_cell", counted)
    return titles


@pytest.fixture(scope="module")
def chat(testbed):
    return load_chat(str(testbed / "llava-mosaic-tiny"), None, None, "v1")


def words(out, *more, pruners=f"ours={PRUNERS}", methods="fastv,uniform", number=NUMBER, budgets="72,29"):
    given = ["--pruners", pruners, "--methods", methods, "--budgets", budgets, "--number", number, "--out", out]
    return [str(word) for word in (*given, "--timed", 0, *more)]


def csv_rows(out):
    with (out / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cell_files(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


# ---- the whole command


def test_table_csv_json_and_plot_of_one_run_agree(out, capsys):
    main(words(out, "--timed", 1, "--warmup", 0, "--repeats", 1))
    printed = capsys.readouterr().out
    rows = csv_rows(out)
    assert len(rows) == 8 == len(cell_files(out))  # origin, 3 methods at 2 budgets, ours at its own
    assert [row["method"] for row in rows if row["reason"]] == ["fastv", "ours"]
    document = json.loads((out / "compare.json").read_text())
    assert document["questions"] == NUMBER and document["vision_tokens"] == 144
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in printed.splitlines() if line[:1] == "│"]
    lines = [shown for shown in lines if shown[0] not in ("72 tokens", "29 tokens", "own budget")]
    for shown, row, entry in zip(lines, rows, document["rows"], strict=True):
        assert (shown[0], row["kind"]) == (row["method"], entry["kind"]) and row["method"] == entry["method"]
        if row["reason"]:
            assert not any(shown[1:]) and not row["accuracy"] and entry["accuracy"] is None
            continue
        assert shown[9] == f"{entry['llm_flops'] / 1e9:.4g}"
        for name in ("accuracy", "average_tokens", "of_origin", "agreement", "llm_flops"):
            assert float(row[name]) == entry[name]
        expected = [f"{entry['average_tokens']:.1f}", f"{entry['accuracy']:.2%}", f"{entry['of_origin']:.1%}"]
        assert shown[1:4] == expected and shown[4] == f"{entry['agreement']:.2%}"
        difference = entry["versus_origin"]
        if difference is not None:
            assert shown[5].startswith(f"{100 * difference['difference']:+.2f} [")
            assert float(row["versus_origin_p"]) == difference["p"]
        assert (row["versus_best_p"] != "") == (row["kind"] == "pruners" and row["budget"] != "")
        assert float(row["prefill_ms"]) > 0 and shown[10].startswith(f"{entry['prefill_ms']:.1f}")
    assert "fastv at 29 tokens is empty: fastv: 29 average tokens are under its floor of 36.75" in printed
    assert "ours at 29 tokens is empty: " in printed and "best baseline at 72 tokens: " in printed
    with Image.open(out / "compare.png") as picture:
        assert picture.size[0] > 800


def test_a_cell_holds_what_the_method_really_kept(out):
    main(words(out, budgets="41"))
    kept = {
        row["method"]: float(row["average_tokens"])
        for row in csv_rows(out)
        if row["budget"] or row["kind"] == "origin"
    }
    assert kept["origin"] == 144 and kept["uniform"] == 41 and 40 < kept["fastv"] <= 41 and 40 < kept["ours"] <= 41
    (path,) = (out / "cells").glob("pruners-41-*.json")
    cell = json.loads(path.read_text())
    assert cell["key"]["budget"] == 41 and cell["result"]["reason"] is None
    asked = [json.loads(line) for line in (out / "testbed" / "test.jsonl").read_text().splitlines()][:NUMBER]
    assert [entry["question_id"] for entry in cell["result"]["questions"]] == [line["question_id"] for line in asked]
    assert all(entry["tokens_per_layer"][0] == 144 for entry in cell["result"]["questions"])


# ---- finished cells


def test_a_finished_comparison_runs_nothing_and_says_the_same(out, ran, capsys):
    main(words(out))
    assert len(ran) == 8
    before, first = cell_files(out), capsys.readouterr().out
    main(words(out))
    heading, _, result = capsys.readouterr().out.partition("\n")
    assert heading == "8 cells, 8 of them finished before" and result in first and "origin" in result
    assert len(ran) == 8 and cell_files(out) == before


def test_other_pruners_run_their_own_cells_alone_and_another_name_none(out, ran, tmp_path):
    pruners = shutil.copytree(PRUNERS, tmp_path / "copy")
    main(words(out, pruners=f"ours={pruners}"))
    ran.clear()
    main(words(out, pruners=f"renamed={pruners}"))
    assert not ran and csv_rows(out)[1]["method"] != "ours"
    description = json.loads((pruners / "prune_config.json").read_text())
    description["prune_config"]["threshold"] = 0.4
    (pruners / "prune_config.json").write_text(json.dumps(description))
    main(words(out, pruners=f"ours={pruners}"))
    assert ran == ["ours, 72 tokens", "ours, 29 tokens", "ours, own budget"]


@pytest.mark.parametrize("what", ["question", "picture", "number", "model", "template", "setting", "seed"])
def test_what_determines_a_cell_runs_it_again(testbed, tmp_path, ran, what):
    data = tmp_path / "data"
    shutil.copytree(testbed, data, ignore=shutil.ignore_patterns("train*"))
    files = ["--question-file", data / "test.jsonl", "--image-folder", data, "--answers", data / "test_answers.jsonl"]
    model = ["--model", data / "llava-mosaic-tiny"]
    given = {"methods": "random", "budgets": "41", "number": 2}
    call = lambda *more: main(words(tmp_path, *model, *files, *more, **given))  # noqa: E731
    call()
    everything = ["origin", "random, 41 tokens", "ours, 41 tokens", "ours, own budget"]
    assert ran == everything
    ran.clear()
    more = []
    if what == "question":
        text = (data / "test.jsonl").read_text()
        (data / "test.jsonl").write_text(text.replace("Row 3, column 2", "Row 2, column 2", 1))
        assert (data / "test.jsonl").read_text() != text
    elif what == "picture":
        Image.new("RGB", (192, 192), "red").save(data / "images" / "test" / "000001.png")
    elif what == "number":
        given["number"] = 3
    elif what == "model":
        config = json.loads((data / "llava-mosaic-tiny" / "config.json").read_text())
        (data / "llava-mosaic-tiny" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    else:
        more = {"template": ["--conv-mode", "plain"], "setting": ["--max_new_tokens", 5], "seed": ["--seed", 1]}[what]
    call(*more)
    assert ran == (["random, 41 tokens"] if what == "seed" else everything)
    ran.clear()
    call(*more)
    assert not ran


def test_other_right_answers_and_a_moved_folder_run_nothing(testbed, tmp_path, ran):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(testbed, first, ignore=shutil.ignore_patterns("train*"))

    def call(data):
        files = ["--question-file", data / "test.jsonl", "--image-folder", data]
        files += ["--answers", data / "test_answers.jsonl", "--model", data / "llava-mosaic-tiny"]
        main(words(tmp_path, *files, methods="uniform", budgets="41"))
        return float(csv_rows(tmp_path)[0]["accuracy"])

    assert call(first) > 0.5
    ran.clear()
    first.rename(second)
    config = second / "llava-mosaic-tiny" / "config.json"
    config.write_text(config.read_text().replace(str(testbed), str(second)))
    answers = [json.loads(line) for line in (second / "test_answers.jsonl").read_text().splitlines()]
    lines = (json.dumps({**line, "answer": "nothing of the kind"}) + "\n" for line in answers)
    (second / "test_answers.jsonl").write_text("".join(lines))
    assert call(second) == 0 and not ran


def test_killed_midway_it_goes_on_after_the_last_finished_cell(out, ran):
    command = [sys.executable, "-m", "llava_prune", "compare", *words(out, number=24)]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    finished = lambda: list((out / "cells").glob("[!.]*.json"))  # noqa: E731
    while len(finished()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {path.name: path.read_text() for path in finished()}
    assert 2 <= len(before) < 8 and not (out / "compare.csv").exists()
    main(words(out, number=24))
    assert len(ran) == 8 - len(before) and len(csv_rows(out)) == 8
    assert {name: (out / "cells" / name).read_text() for name in before} == before


def test_interrupted_it_says_how_to_go_on(out):
    command = [sys.executable, "-m", "llava_prune", "compare", *words(out, number=24)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may not hear it
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, preexec_fn=heard, **pipes)
    while not list((out / "cells").glob("[!.]*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "goes on after the last finished cell" in errors and "Traceback" not in errors


def test_a_damaged_cell_is_named(out):
    main(words(out))
    path = next((out / "cells").glob("uniform-72-*"))
    path.write_text("{")
    with pytest.raises(SystemExit, match=rf"{path.name} is damaged .*delete it"):
        main(words(out))


# ---- answers


def test_answers_and_tokens_are_the_same_in_batches(chat, testbed, tmp_path):
    """Every baseline and pruners, one question at a time and five at once, prompts of several lengths among them."""
    questions = read_questions(testbed / "test.jsonl", testbed, testbed / "test_answers.jsonl", 10)
    for cell in plan(list(METHODS), {"ours": PRUNERS}, [41.0]):
        one, many = (
            runner.run_cell(chat, cell, questions, runner.Settings(batch_size=size, max_new_tokens=4, timed=0))
            for size in (1, 5)
        )
        assert one["questions"] == many["questions"], cell.title
    assert find_handle(chat.model) is None


def test_a_method_that_does_not_suit_the_model_is_an_empty_cell_and_leaves_nothing_behind(chat, testbed, monkeypatch):
    questions = read_questions(testbed / "test.jsonl", testbed, testbed / "test_answers.jsonl", 1)
    cell = plan(["vtw"], {}, [41.0])[1]
    monkeypatch.setattr(chat.model.config, "image_aspect_ratio", "anyres")
    result = runner.run_cell(chat, cell, questions, runner.Settings(timed=0))
    assert result.keys() == {"reason"} and "not fixed in this model" in result["reason"]
    assert find_handle(chat.model) is None


def test_a_floor_that_only_a_sample_knows_is_an_empty_cell(chat, testbed, monkeypatch):
    """Where the vision tokens of a picture are not fixed, the budget is only checked as questions are asked."""
    from llava_prune import compat

    questions = read_questions(testbed / "test.jsonl", testbed, testbed / "test_answers.jsonl", 1)
    monkeypatch.setattr(compat, "vision_tokens_per_image", lambda model: None)
    for name, pruners in (("fastv", {}), (None, {"ours": PRUNERS})):
        cell = plan([name] if name else [], pruners, [12.0])[1]
        result = runner.run_cell(chat, cell, questions, runner.Settings(timed=0))
        assert "floor" in result["reason"] and find_handle(chat.model) is None


def test_the_key_knows_the_weights(chat, testbed):
    questions = read_questions(testbed / "test.jsonl", testbed, testbed / "test_answers.jsonl", 1)
    before = runner.inputs_of(chat, questions, runner.Settings())
    assert runner.inputs_of(chat, questions, runner.Settings()) == before
    weight = chat.model.model.layers[3].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
        after = runner.inputs_of(chat, questions, runner.Settings())
        weight[0, 0] -= 1
    assert [name for name in before if before[name] != after[name]] == ["model"]


# ---- what can not be used


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "fastv,fastvv"], "no baseline 'fastvv'; use all, none, or some of random"),
        (["--budgets", "72,x"], "expected numbers separated by commas"),
        (["--budgets", "-3"], "must be positive"),
        (["--budgets", "144"], "144 prunes nothing, an image has 144 vision tokens here"),
        (["--model", "somewhere"], "--budgets is needed with --model"),
        (["--question-file", "q"], "belong together"),
        (["--number", "25"], "holds 24 questions, --number asks for 25"),
        (["--timed", "-1"], "--timed must be at least 0, got -1"),
        (["--pruners", "nowhere"], "no prune_config.json in nowhere"),
        (["--pruners", f"fastv={PRUNERS}"], "'fastv' is taken"),
        (["--pruners", "=x"], "give NAME=DIR or DIR"),
        (["--methods", "none"], "nothing to compare with origin"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_used_is_named_before_anything_runs(out, ran, more, message):
    with pytest.raises(SystemExit) as error:
        main(["--out", str(out), *more])
    assert str(error.value).startswith("llava_prune compare: ") and message in str(error.value) and not ran


def test_pruners_of_another_base_are_refused_before_anything_runs(out, ran, tmp_path):
    pruners = shutil.copytree(PRUNERS, tmp_path / "copy")
    description = json.loads((pruners / "prune_config.json").read_text())
    description["base_model"]["name"] = "llava-v1.5-7b"
    (pruners / "prune_config.json").write_text(json.dumps(description))
    with pytest.raises(SystemExit, match="trained on 'llava-v1.5-7b'"):
        main(words(out, pruners=str(pruners)))
    assert not ran
    main(words(out, "--allow_other_base", pruners=str(pruners), methods="none", budgets="41"))
    assert ran == ["origin", "copy, 41 tokens", "copy, own budget"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question_id": 1, "image": "a.png"}', "line 3, lacks ['text']"),
        ('{"question_id": 1, "image": "a.png", "text": 5}', "text must be"),
        ("nonsense", "line 3, is not JSON"),
        ('{"question_id": "test-000000", "image": "a.png", "text": "?"}', "repeats question_id 'test-000000'"),
        ('{"question_id": 7, "image": "a.png", "text": "?"}', "no answer to question 7"),
        ('{"question_id": "test-000002", "image": "a.png", "text": "?"}', "no picture"),
    ],
)
def test_bad_questions_are_named(testbed, tmp_path, line, message):
    good = (testbed / "test.jsonl").read_text().splitlines()[:2]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([*good, line]) + "\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_questions(path, testbed, testbed / "test_answers.jsonl", None)
    assert message in str(error.value)


def test_pruners_are_named_after_their_folder_unless_told(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert parse_pruners([str(odd), "x=outputs/prune"]) == {"a=b": odd, "x": type(odd)("outputs/prune")}
    with pytest.raises(ValueError, match="'x' is taken"):
        parse_pruners(["x=1", "x=2"])


def test_flat_rows_have_the_same_columns(tmp_path):
    cells = CellFiles(tmp_path / "cells", {})
    assert cells.load(plan([], {}, [])[0]) is None
    names = {tuple(table.flat(table.Row("a", "origin", None, reason))) for reason in (None, "floor")}
    assert len(names) == 1
