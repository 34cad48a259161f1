"""Merging, converting and scoring of answers: on files of the benchmarks' real format, and refused when they lack."""

import importlib.util
import json
from pathlib import Path

import playground
import pytest
from playground import write_json, write_lines

from llava_prune.evaluation import convert, scorers, table
from llava_prune.evaluation.merge import merge, report_path
from llava_prune.evaluation.questions import chunk_count, read_lines, read_questions
from llava_prune.evaluation.score import measured

needs_llava = pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="LLaVA's scorers")


def answers_to(questions, texts, path):
    """What LLaVA writes: a line a question."""
    rows = [
        {"question_id": q["question_id"], "prompt": q["text"], "text": text, "answer_id": "x", "model_id": "m"}
        for q, text in zip(questions, texts, strict=False)
    ]
    write_lines(path, [row | {"metadata": {}} for row in rows])
    return path


def sidecar_line(tokens):
    return {"mode": "hard", "vision_tokens": 144, "average_tokens": tokens, "llm_flops": 2.0, "seconds": 1.0}


# ---- questions and chunks


@pytest.mark.parametrize("questions,asked", [(6, 4), (1, 8), (8, 8), (10, 3), (5, 1), (100, 7)])
def test_chunk_count_is_what_llava_cuts(questions, asked):
    from llava.eval.model_vqa_loader import split_list

    count = chunk_count(questions, asked)
    assert count == len(split_list(range(questions), asked)) == len(split_list(range(questions), count))


def test_question_files_of_all_three_kinds(tmp_path):
    playground.sqa(tmp_path)
    playground.pope(tmp_path)
    assert [q.id for q in read_questions(tmp_path / "scienceqa/llava_test_CQM-A.json")] == ["4", "5", "11"]
    assert read_questions(tmp_path / "pope/llava_pope_test.jsonl")[3].prompt.startswith("Is there a blue circle")
    pytest.importorskip("pandas")
    playground.mmbench(tmp_path)
    assert [q.id for q in read_questions(tmp_path / "mmbench/mmbench_dev_20230712.tsv")] == [241, 252]
    write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="no question"):
        read_questions(tmp_path / "empty.jsonl")


# ---- merge


@pytest.fixture
def chunks(tmp_path):
    """Questions, two of which share an id, and the answers to them in two chunks."""
    playground.textvqa(tmp_path)
    questions = tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    rows = read_lines(questions) + [playground.question("b", "b.jpg", "why?")]
    write_lines(questions, rows)
    paths = [answers_to(rows[:2], ["yes", "no ünï"], tmp_path / "2_0.jsonl")]
    paths.append(answers_to(rows[2:], ["so"], tmp_path / "2_1.jsonl"))
    write_lines(report_path(paths[0]), [sidecar_line(40.0), sidecar_line(42.0)])
    write_lines(report_path(paths[1]), [{"mode": "hard", "vision_tokens": 0, "seconds": 3.0}])
    return questions, paths, tmp_path / "answers" / "merge.jsonl"


def test_merged_answers_are_the_chunks_byte_for_byte(chunks):
    questions, paths, out = chunks
    assert merge(questions, paths, out) == 3
    assert out.read_bytes() == paths[0].read_bytes() + paths[1].read_bytes()
    assert [line["question_id"] for line in read_lines(report_path(out))] == ["003a8ae2ef43b901"] * 2 + ["b"]
    figures = measured(out)
    assert figures["questions"] == 3 and figures["with_image"] == 2
    assert figures["average_tokens"] == 41 and figures["median_seconds"] == 1


def test_merge_refuses_what_is_not_a_complete_run(chunks):
    questions, paths, out = chunks

    def refused(message, chunks=paths):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge(questions, chunks, out)
        assert not out.exists() and not report_path(out).exists()

    refused("2 answers to 3 questions", paths[:1])
    refused("line 1, answers question 'b'", paths[::-1])
    refused("2_2.jsonl", [*paths, out.with_name("2_2.jsonl")])
    # the same id with another prompt is another question
    whole = paths[0].read_text()
    first, second = whole.splitlines(keepends=True)
    paths[0].write_text(second + first)
    refused("line 1")
    paths[0].write_text(whole[:-5])
    refused("line 2, is not JSON")
    paths[0].write_text(whole)
    write_lines(report_path(paths[1]), [])
    refused("1 answers, its sidecar 0")


# ---- converters


def test_gqa_and_mmvet(tmp_path):
    rows = [playground.question(name, "x.jpg", "?") for name in ("201307251", "7")]
    source = answers_to(rows, ["Red.", "No"], tmp_path / "merge.jsonl")
    made = json.loads(convert.convert_gqa(source, tmp_path / "a/gqa.json").read_text())
    assert made == [{"questionId": "201307251", "prediction": "red"}, {"questionId": "7", "prediction": "no"}]
    made = json.loads(convert.convert_mmvet(source, tmp_path / "b/mmvet.json").read_text())
    assert made == {"v1_201307251": "Red.", "v1_7": "No"}


@needs_llava
def test_vqav2_fills_the_rest_of_the_test_set_and_nothing_of_its_split(tmp_path):
    playground.vqav2(tmp_path)
    folder, split = tmp_path / "vqav2", "llava_vqav2_mscoco_test-dev2015"
    rows = read_lines(folder / f"{split}.jsonl")
    source = folder / f"answers/{split}/name/merge.jsonl"
    answers_to(rows, ["Yes.", "two dogs"], source)
    made = json.loads(convert.convert_vqav2(folder, "name", split).read_text())
    assert [row["answer"] for row in made] == ["", "yes", "2 dogs", ""]
    assert [row["question_id"] for row in made] == [262144000 + i for i in range(4)]
    answers_to(rows[:1], ["yes"], source)
    with pytest.raises(ValueError, match="no answer to 1 questions"):
        convert.convert_vqav2(folder, "name", split)


@needs_llava
def test_vizwiz(tmp_path):
    playground.vizwiz(tmp_path)
    questions = tmp_path / "vizwiz/llava_test.jsonl"
    source = answers_to(read_lines(questions), ["Unanswerable", "a cup"], tmp_path / "a.jsonl")
    made = json.loads(convert.convert_vizwiz(questions, source, tmp_path / "up/a.json").read_text())
    assert made == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "cup"},
    ]


def test_seed_counts_by_type_and_refuses_gaps(tmp_path, capsys):
    playground.seed(tmp_path)
    annotations, questions = tmp_path / "seed_bench/SEED-Bench.json", tmp_path / "seed_bench/llava-seed-bench.jsonl"
    source = answers_to(read_lines(questions), ["A", "B", "A"], tmp_path / "a.jsonl")
    score = scorers.seed(annotations, questions, source, tmp_path / "up/a.jsonl")
    assert score.value == pytest.approx(200 / 3) and score.details["image"] == 50 and score.details["video"] == 100
    assert score.details["Scene Understanding"] == 50 and "total: 66.67%" in capsys.readouterr().out
    assert read_lines(tmp_path / "up/a.jsonl")[0] == {"question_id": "101669", "prediction": "A"}
    answers_to(read_lines(questions)[:2], ["A", "B"], source)
    with pytest.raises(ValueError, match="no answer to 1 questions"):
        convert.convert_seed(annotations, source, tmp_path / "up/a.jsonl")


def test_mmbench_sheet(tmp_path):
    pandas = pytest.importorskip("pandas")
    playground.mmbench(tmp_path)
    folder = tmp_path / "mmbench"
    rows = [playground.question(index, "", "?") for index in (241, 252)]
    answers_to(rows, ["A", "B. square"], folder / "answers/name.jsonl")
    annotations = folder / "mmbench_dev_20230712.tsv"
    made = convert.convert_mmbench(annotations, folder / "answers", folder / "up", "name")
    sheet = pandas.read_excel(made)
    assert list(sheet.columns) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert list(sheet["prediction"]) == ["A", "B. square"] and list(sheet["index"]) == [241, 252]
    answers_to(rows[:1], ["A"], folder / "answers/name.jsonl")
    with pytest.raises(ValueError, match="no answer to 1"):
        convert.convert_mmbench(annotations, folder / "answers", folder / "up", "name")


@pytest.fixture
def mme(tmp_path):
    """MME's folder and its questions, answered right but for one."""
    playground.mme(tmp_path)
    questions = read_lines(tmp_path / "MME/llava_mme.jsonl")
    answers_to(questions, ["Yes", "No.", "yes\n\nit is", "Yes"], tmp_path / "MME/answers/name.jsonl")
    return tmp_path / "MME", questions


def test_mme_lines_and_points(mme):
    folder, _ = mme
    score = scorers.mme(folder, folder / "llava_mme.jsonl", folder / "answers/name.jsonl")
    assert (folder / "eval_tool/answers/name/color.txt").read_text() == (
        "0020.txt\tIs there a red circle? Please answer yes or no.\tYes\tyes it is\n"
        "0020.txt\tIs there a blue circle?  Please answer yes or no.\tNo\tYes\n"
    )
    assert score.details == {"perception": 50, "cognition": 200} and score.value == 250
    (folder / "eval_tool/calculation.py").unlink()
    score = scorers.mme(folder, folder / "llava_mme.jsonl", folder / "answers/name.jsonl")
    assert score.value is None and (score.submission / "code_reasoning.txt").is_file()


def test_mme_refuses_gaps_and_pairs_that_are_torn_apart(mme):
    folder, questions = mme
    answers = folder / "answers/name.jsonl"
    answers_to(questions[:3], ["Yes"] * 3, answers)
    with pytest.raises(ValueError, match="no answer to 1 questions"):
        convert.convert_mme(folder, "name")
    # a second picture of the category, whose questions come between those of the first
    release = folder / "MME_Benchmark_release_version/code_reasoning"
    (release / "0021.txt").write_text((release / "0020.txt").read_text())
    other = [q | {"question_id": "code_reasoning/0021.png"} for q in questions[:2]]
    answers_to([questions[0], *other, *questions[1:]], ["Yes"] * 6, answers)
    with pytest.raises(ValueError, match="do not follow each other in code_reasoning"):
        convert.convert_mme(folder, "name")
    answers_to([questions[0] | {"text": "What?"}], ["Yes"], answers)
    with pytest.raises(ValueError, match="does not hold"):
        convert.convert_mme(folder, "name")


# ---- scorers


@pytest.fixture
def pope(tmp_path):
    playground.pope(tmp_path)
    questions = tmp_path / "pope/llava_pope_test.jsonl"
    source = answers_to(read_lines(questions), ["Yes", "No", "Yes", "Yes.", "Yes", "no"], tmp_path / "a.jsonl")
    return tmp_path / "pope/coco", questions, source


@needs_llava
def test_pope(pope):
    score = scorers.pope(*pope)
    assert score.value == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert score.details["f1 popular"] == pytest.approx(200 / 3) and score.details["accuracy"] == pytest.approx(
        250 / 3
    )


@needs_llava
def test_pope_refuses_labels_and_answers_that_do_not_line_up(pope):
    labels, questions, source = pope
    asked, given = read_lines(questions), read_lines(source)
    write_lines(source, given[:5])
    with pytest.raises(ValueError, match="5 answers to 6 questions"):
        scorers.pope(*pope)
    write_lines(source, [given[1], given[0], *given[2:]])
    with pytest.raises(ValueError, match="line 1, answers question 1"):
        scorers.pope(*pope)
    write_lines(source, given)
    # POPE's later files have more labels, in another order
    file = labels / "coco_pope_random.json"
    whole = read_lines(file)
    for wrong in (whole[::-1], whole + whole[:1]):
        write_lines(file, wrong)
        with pytest.raises(ValueError, match="are others"):
            scorers.pope(*pope)
    file.unlink()
    with pytest.raises(ValueError, match="nothing else"):
        scorers.pope(*pope)
    # LLaVA's scorer divides by the number of answers "yes"
    write_lines(file, whole)
    answers_to(asked, ["No"] * 6, source)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        scorers.pope(*pope)


@needs_llava
def test_textvqa_and_its_gap(tmp_path):
    playground.textvqa(tmp_path)
    questions = tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    source = answers_to(read_lines(questions), ["dakota", "canon"], tmp_path / "a.jsonl")
    annotations = tmp_path / "textvqa/TextVQA_0.5.1_val.json"
    assert scorers.textvqa(annotations, questions, source).value == 50
    answers_to(read_lines(questions)[:1], ["dakota"], source)
    with pytest.raises(ValueError, match="1 answers to 2"):
        scorers.textvqa(annotations, questions, source)


@needs_llava
def test_sqa_and_its_gap(tmp_path):
    playground.sqa(tmp_path)
    folder = tmp_path / "scienceqa"
    questions = folder / "llava_test_CQM-A.json"
    samples = json.loads(questions.read_text())
    rows = [
        {"question_id": s["id"], "text": ("<image>\n" if "image" in s else "") + s["conversations"][0]["value"]}
        for s in samples
    ]
    source = answers_to(rows, ["A", "B", "B"], tmp_path / "a.jsonl")
    score = scorers.sqa(folder, questions, source)
    assert score.value == 50 and score.details["accuracy"] == 33.33
    # a question of the split that the question file does not hold would count as wrong
    write_json(questions, samples[:2])
    answers_to(rows[:2], ["A", "B"], source)
    with pytest.raises(ValueError, match="does not ask 1 questions"):
        scorers.sqa(folder, questions, source)


def test_gqa_with_and_without_its_program(tmp_path):
    playground.gqa(tmp_path)
    data, questions = tmp_path / "gqa/data", tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl"
    source = answers_to(read_lines(questions), ["Red.", "blue", "red"], tmp_path / "merge.jsonl")
    score = scorers.gqa(data, questions, source)
    assert score.value == 66.67 and score.submission == tmp_path / "merge.predictions.json"
    (data / "eval/eval.py").write_text("raise SystemExit('no such tier')")
    with pytest.raises(ValueError, match="no such tier"):
        scorers.gqa(data, questions, source)
    (data / "eval/eval.py").unlink()
    # what one run leaves for the server stays when another is scored
    other = answers_to(read_lines(questions), ["blue"] * 3, tmp_path / "hard/merge.jsonl")
    scores = [scorers.gqa(data, questions, file) for file in (source, other)]
    assert [score.value for score in scores] == [None, None]
    made = [[row["prediction"] for row in json.loads(score.submission.read_text())] for score in scores]
    assert made == [["red", "blue", "red"], ["blue"] * 3]


def test_gqa_of_two_runs_at_once(tmp_path, monkeypatch):
    """Each is scored by its own answers, wherever they lie."""
    monkeypatch.chdir(tmp_path)
    playground.gqa(Path())
    data, questions = Path("gqa/data"), Path("gqa/llava_gqa_testdev_balanced.jsonl")
    first = answers_to(read_lines(questions), ["red"] * 3, Path("{tier}/merge.jsonl"))
    other = answers_to(read_lines(questions), ["blue"] * 3, tmp_path / "other/merge.jsonl")
    run, others = scorers._run, []

    def run_after_another_was_scored(*command, **settings):
        monkeypatch.setattr(scorers, "_run", run)
        others.append(scorers.gqa(data, questions, other))
        return run(*command, **settings)

    monkeypatch.setattr(scorers, "_run", run_after_another_was_scored)
    assert scorers.gqa(data, questions, first).value == 100 and others[0].value == 0


def test_mosaic_answers_are_split_at_newlines_alone(tmp_path):
    truth, questions, source = (tmp_path / f"{name}.jsonl" for name in ("truth", "questions", "answers"))
    write_lines(truth, [{"question_id": "a", "answer": "red", "kind": "color"}])
    write_lines(questions, [playground.question("a", "a.png", "what?")])
    source.write_text('{"question_id": "a", "prompt": "what?", "text": "red\u2028"}\n\n')
    assert scorers.mosaic(truth, questions, source).value == 100


# ---- the table


def result(folder, benchmark, score, **changes):
    values = {"model": "m", "method": "", "metric": "accuracy", "questions": 9, "submission": None}
    tokens = {"average_tokens": 40.0, "vision_tokens": 144.0}
    write_json(folder / f"{benchmark}.json", values | tokens | {"benchmark": benchmark, "score": score} | changes)


def test_table_compares_only_what_can_be_compared(tmp_path):
    origin, hard = tmp_path / "origin", tmp_path / "hard"
    for name, score in (("a", 80.0), ("b", 80.0), ("c", 0.0), ("d", None), ("e", 80.0), ("f", 50.0)):
        result(origin, name, score)
    result(hard, "a", 60.0, method="p")
    result(hard, "b", 60.0, questions=8)
    result(hard, "c", 60.0)
    result(hard, "d", None, submission="up/d.json")
    (hard / "e.log").write_text("Traceback")
    (hard / "f.missing").write_text("f/data: from there\n")
    header, *rows = table.build(list("abcdefg"), {"origin": origin, "hard": hard})
    assert header == ["benchmark", "metric", "origin", "hard", "hard of origin", "average tokens, hard"]
    assert rows[0] == ["a", "accuracy", "80.00", "60.00", "75.0%", "40.0 of 144"]
    assert [row[4] for row in rows[1:]] == ["-"] * 6
    assert [row[3] for row in rows] == ["60.00", "60.00", "60.00", "submission file", "failed", "no data", "not run"]
    text = "\n".join(table.notes(list("abcdefg"), {"origin": origin, "hard": hard}))
    assert "d, hard, submission file: up/d.json" in text and "e, hard, failed: see" in text
    assert "f needs f/data: from there" in text and "hard: m with p (a)" in text
