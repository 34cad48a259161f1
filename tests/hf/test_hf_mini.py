"""mini: questions that are right by construction, a base that is taught what it is asked, and every step done once."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from statistics import stdev

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_prune.comparing.cells import BASELINE, PRUNERS
from llava_prune.comparing.questions import read_questions
from llava_prune.comparing.summary import Row, _add_best
from llava_prune.config import PruneConfig
from llava_prune.data_hf import ConversationDataset
from llava_prune.testbed.base_data import paint_batch
from llava_prune.testbed.mini import pipeline, results
from llava_prune.testbed.mini.__main__ import main
from llava_prune.testbed.mini.ablations import ADAPTED, MAIN, SCRATCH, SECOND, VARIANTS, chosen
from llava_prune.testbed.mini.assemble import assemble, save
from llava_prune.testbed.mini.base import BaseTraining
from llava_prune.testbed.mini.comparisons import Comparison
from llava_prune.testbed.mini.conversations import ALL_KINDS, Conversations, conversation_ids, said
from llava_prune.testbed.mini.data import DataAmounts, plain_questions, transfer_sets, write_data
from llava_prune.testbed.mini.intervals import of_seeds, of_share
from llava_prune.testbed.mini.jobs import Job, run_jobs
from llava_prune.testbed.mini.pack import pack, read_packed, unpack, write_packed
from llava_prune.testbed.mini.packages import DINOV2, SMOLLM2, find_file
from llava_prune.testbed.mini.pipeline import Mini, Plan
from llava_prune.testbed.mini.size import REAL, TINY
from llava_prune.testbed.mini.trainee import Tiles, Trainee
from llava_prune.testbed.mini.trainings import Trainings, TrainingSettings
from llava_prune.testbed.mini.wordings import HELD_OUT, TRAINED
from llava_prune.testbed.mosaic import MosaicSampler, paint, resize
from llava_prune.testbed.pictures import COLORS, SHAPES, load_pictures
from llava_prune.testbed.questions import KINDS, WORD_KINDS, compose, subjects
from llava_prune.testbed.words import WORDS, with_words

GRIDS = {
    "train": (5, 5),
    "val": (5, 5),
    "test": (5, 5),
    "wordings": (5, 5),
    "4x4": (4, 4),
    "6x6": (6, 6),
    "7x7": (7, 7),
}


@pytest.fixture(scope="module")
def pictures():
    return {split: with_words(load_pictures(split), split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few samples of every set, as the real size has them."""
    return write_data(tmp_path_factory.mktemp("data"), REAL, DataAmounts(mosaics=10, turns=5, questions=20))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The random model, its processor and the folder of both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model, processor = assemble(TINY)
    save(model, processor, folder, torch.float32)
    return model.eval(), processor, folder


def asked(folder, name):
    """(picture, question, answer) of every question of a set."""
    if name == "train":
        for sample in json.loads((folder / "train.json").read_text()):
            question, answer = (turn["value"] for turn in sample["conversations"])
            yield sample["image"], question.removeprefix("<image>\n"), answer
        return
    for question in read_questions(folder / f"{name}.jsonl", folder, folder / f"{name}_answers.jsonl", None):
        yield question.image, question.text, question.answer


def true_answer(question, labels, columns):
    """The answer worked out from the words alone, without the code that made them."""
    words = set(re.findall(r"[a-z]+", question.lower()))
    shapes = [word for word in SHAPES if words & {word, f"{word}s"}]
    colors = [word for word in COLORS if word in words]
    if places := re.findall(r"\d", question):
        row, column = map(int, places)
        label = labels[(row - 1) * columns + column - 1]
        return label if "word" in words else label[1 if "color" in words else 0]
    if "word" in words:
        (named,) = words & set(WORDS)
        row, column = divmod(labels.index(named), columns)
        return str((row if "row" in words else column) + 1)
    pairs = [label for label in labels if not isinstance(label, str)]
    matching = [(s, c) for s, c in pairs if s in (shapes or SHAPES) and c in (colors or COLORS)]
    if shapes and colors:
        return "yes" if matching else "no"
    if words & {"many", "count", "number"}:
        return str(len(matching))
    assert len(matching) == 1
    return matching[0][0 if colors else 1]


# ---- questions and data


@pytest.mark.parametrize("name", GRIDS)
def test_answers_are_right_and_of_one_split(data, pictures, name):
    rows, columns = GRIDS[name]
    side, own = REAL.cell((rows, columns)), "train" if name in ("train", "val") else "test"
    known = {
        split: dict(zip((tile.tobytes() for tile in resize(p.images, side)), p.labels, strict=True))
        for split, p in pictures.items()
    }
    count, seen = 0, Counter()
    for image, question, answer in asked(data, name):
        pixels = np.asarray(Image.open(data / image))
        assert pixels.shape == (336, 336, 3)
        cells = [pixels[r * side :, c * side :][:side, :side].tobytes() for r in range(rows) for c in range(columns)]
        assert not any(cell in known["test" if own == "train" else "train"] for cell in cells), "of the other split"
        labels = [known[own][cell] for cell in cells]
        assert sum(isinstance(label, str) for label in labels) == rows * columns // 4
        assert answer == true_answer(question, labels, columns), (image, question)
        count += 1
        seen[
            re.sub(r"\d|\b(" + "|".join((*WORDS, *COLORS)) + r"|\w*(circle|rectangle|triangle)s?)\b", "", question)
        ] += 1
    assert count == (50 if name == "train" else 20)
    templates = {re.sub(r"\{\d?\}s?", "", text) for texts in HELD_OUT.values() for text in texts}
    assert bool(seen.keys() & templates) == (name == "wordings"), "held-out wordings in a set that is not theirs"


def test_what_choices_are_made_on_was_not_trained_on(data):
    side = REAL.cell((5, 5))

    def cells(name):
        for path in (data / "images" / name).iterdir():
            pixels = np.asarray(Image.open(path))
            places = [(r * side, c * side) for r in range(5) for c in range(5)]
            yield from (pixels[r : r + side, c : c + side].tobytes() for r, c in places)

    assert len(set(cells("val"))) > 100 and not set(cells("val")) & set(cells("train"))


def test_every_kind_is_asked_and_single_pictures_are_the_packages(data, pictures):
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert Counter(line["category"] for line in lines) == dict.fromkeys((*KINDS, *WORD_KINDS), 2)
    whole = {tile.tobytes(): i for i, tile in enumerate(resize(load_pictures("test").images, 336))}
    turns = plain_questions("test")
    for image, question, answer in asked(data, "plain"):
        index = whole[np.asarray(Image.open(data / image)).tobytes()]
        assert (question, answer) in [(turn.question, turn.answer) for turn in turns[index]]
    assert {path.stem for path in data.glob("*_answers.jsonl")} == {
        f"{name}_answers" for name in ("val", "test", *transfer_sets(REAL))
    }


def test_data_are_written_once_and_the_same_again(data, tmp_path):
    amounts = DataAmounts(mosaics=3, turns=2, questions=4)
    out = write_data(tmp_path, TINY, amounts)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    write_data(out, TINY, amounts)
    assert all(path.stat().st_mtime_ns == before[path][0] for path in before)
    (out / "mini.json").unlink()  # as after a run that broke off
    write_data(out, TINY, amounts)
    assert all(path.read_bytes() == before[path][1] for path in before)


def test_wordings_are_of_every_kind_and_held_out_ones_are_no_others():
    assert TRAINED.keys() == HELD_OUT.keys() == {*KINDS, *WORD_KINDS}
    for kind, texts in HELD_OUT.items():
        assert not set(texts) & set(TRAINED[kind])
        fields = {tuple(sorted(re.findall(r"\{(\d?)\}", text))) for text in (*texts, *TRAINED[kind])}
        assert len(fields) == 1, kind


def test_mosaics_with_words():
    rng = Random(0)
    with pytest.raises(ValueError, match="with words 4 cells"):
        compose("word_at", 3, rng, WORDS)
    with pytest.raises(ValueError, match="expected one of"):
        compose("word_at", 9, rng)
    counts = Counter()
    for _ in range(2000):
        labels, subject = compose("count_color", 16, rng, WORDS)
        words = [label for label in labels if isinstance(label, str)]
        assert len(words) == len(set(words)) == 4
        counts[sum(label[1] == subject for label in labels if not isinstance(label, str))] += 1
        assert not any(isinstance(labels[cell], str) for cell in subjects("color_at", labels, rng))
    assert set(counts) == set(range(6)) and min(counts.values()) > 250
    for _ in range(50):
        labels, subject = compose("shape_at", 16, rng, WORDS)
        assert not isinstance(labels[subject], str)
        labels, subject = compose("word_at", 16, rng, WORDS)
        assert isinstance(labels[subject], str)


# ---- the base


def test_conversations_are_what_tests_and_trainings_say(tiny, pictures, tmp_path):
    """Token for token what the processor makes of the same turns, and answers where the training has its labels."""
    _, processor, _ = tiny
    sampler = MosaicSampler(pictures["train"].by_label(), (2, 2), Random(1), TRAINED)
    mosaic = sampler.draw("word_row", 4)
    turns = [
        part
        for number, turn in enumerate(mosaic.turns)
        for part in (
            {"from": "human", "value": turn.question if number else f"<image>\n{turn.question}"},
            {"from": "gpt", "value": turn.answer},
        )
    ]
    Image.new("RGB", (84, 84)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    item = ConversationDataset(str(tmp_path / "a.json"), str(tmp_path), processor, 1024)[0]
    opening, turn = conversation_ids(processor.tokenizer)
    parts = [turn(t.question, t.answer, number == 0) for number, t in enumerate(mosaic.turns)]
    ids = [*opening, *[processor.image_token_id] * TINY.vision_tokens, *(i for part, _ in parts for i in part)]
    assert item["input_ids"].tolist() == ids
    flags = [flag for part, answer in parts for flag in [False] * (len(part) - answer) + [True] * answer]
    assert (item["labels"] != -100)[-len(flags) :].tolist() == flags


@pytest.mark.parametrize("listings", [True, False])
def test_batches_hold_answers_of_the_given_pictures_alone(tiny, pictures, listings):
    tokenizer = tiny[1].tokenizer
    groups = {label: group[:3] for label, group in pictures["train"].by_label().items()}
    plain = [(7, ("circle", "red"), plain_questions("train")[7])]
    stream = Conversations(groups, plain, conversation_ids(tokenizer)[1], TINY, 3, listings, seed=0)
    allowed, grids = {i for group in groups.values() for i in group}, set()
    for _, batch in zip(range(80), stream, strict=False):
        grids.add(batch.grid)
        assert set(batch.cells.flatten().tolist()) <= (allowed if batch.grid != (1, 1) else {7})
        assert len(batch.places) == len(batch.turns) and batch.kinds.max() < len(ALL_KINDS)
        assert (batch.places % batch.ids.shape[1]).min() > 0
        tokens = batch.ids.flatten()[batch.places]
        for number, kind in enumerate(batch.kinds.tolist()):
            answer = tokenizer.decode(tokens[batch.turns == number])
            assert answer.endswith("<|im_end|>\n"), answer
            words = answer.removesuffix("<|im_end|>\n").split(", ")
            if ALL_KINDS[kind] == "listing" and listings and len(words) == batch.cells.shape[1]:
                cells = batch.cells[int(batch.places[batch.turns == number][0]) // batch.ids.shape[1]]
                truth = [("circle", "red")] if batch.grid == (1, 1) else [pictures["train"].labels[i] for i in cells]
                assert words == [said(label) for label in truth]
            assert (ALL_KINDS[kind] == "listing") or (not listings and len(words) == 1)
    assert grids == {(2, 2), (3, 3), (1, 1)}


def test_the_base_is_trained_on_the_sequence_and_pixels_that_it_is_used_on(tiny, pictures):
    model, processor, _ = tiny
    opening, turn = conversation_ids(processor.tokenizer)
    ids, count = turn("What word is in row 1, column 2?", "rice", True)
    mosaic = MosaicSampler(pictures["test"].by_label(), (2, 2), Random(0)).draw("word_at")
    tiles = Tiles(pictures["test"], len(load_pictures("test").images), TINY, torch.device("cpu"))
    cells = torch.tensor([mosaic.pictures])
    pixels = paint_batch(tiles.by_grid[2, 2], cells, processor.image_processor, False, (2, 2), TINY.pixels)
    picture = Image.fromarray(paint(pictures["test"], mosaic, (2, 2), TINY.cell((2, 2)), TINY.pixels))
    text = processor.tokenizer.decode([*opening, processor.image_token_id, *ids])
    inputs = processor(text=text, images=picture, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], pixels)
    batch = (pixels, torch.tensor([ids]), torch.arange(len(ids) - count, len(ids)))
    trainee = Trainee(model, opening, False)
    with torch.no_grad():
        plain = trainee(*batch)
        torch.testing.assert_close(plain, model(**inputs).logits[0, -count - 1 : -1], atol=1e-4, rtol=1e-4)
        trainee.standardise(torch.randn(4, 3, 84, 84))
        ours = trainee(*batch)
        assert (ours - plain).abs().max() > 1e-3
        trainee.fold()
        theirs = model(**inputs).logits[0, -count - 1 : -1]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_words_are_never_mirrored(pictures):
    count = len(load_pictures("train").images)
    images = torch.from_numpy(pictures["train"].images).permute(0, 3, 1, 2).contiguous()
    processor = type("Processor", (), {"image_mean": [0.0] * 3, "image_std": [1.0] * 3})
    cells = torch.tensor([[count + 3, 0, 0, 0], [count + 50, 0, 0, 0]]).repeat(8, 1)
    painted = paint_batch(images, cells, processor, True, (2, 2), 140, mirrored=count)
    torch.testing.assert_close(painted[:, :, :64, :64], images[cells[:, 0]] / 255)
    shown = {tuple(row.flatten().tolist()) for row in (painted[:, :, :64, 64:128] * 255).round().to(torch.uint8)}
    assert len(shown) > 1, "pictures should be"
    assert (painted[:, :, 128:] == 1).all() and (painted[:, :, :, 128:] == 1).all()


def test_a_packed_base_is_nearly_the_trained_one(tmp_path):
    torch.manual_seed(0)
    before = {
        "large": torch.randn(256, 512),
        "norm": torch.ones(64),
        "small": torch.randn(8, 8),
        "same": torch.ones(3),
        "random": torch.randn(256, 512),
    }
    moved = {"large": torch.randn(256, 512) * 1e-3, "norm": torch.randn(64), "small": torch.randn(8, 8)}
    after = {name: value + moved.get(name, 0) for name, value in before.items()}
    write_packed(pack(before, after, whole="random"), tmp_path)
    sizes = sum(path.stat().st_size for path in tmp_path.glob("packed-*"))
    assert sizes < 256 * 512 * 2.56 + 3000, "half a byte a weight, and two of a random one"
    again = unpack({**before, "random": torch.randn(256, 512)}, read_packed(tmp_path))
    torch.testing.assert_close(again["random"], after["random"], atol=2e-3, rtol=1e-3)
    assert torch.equal(again["same"], before["same"]) and again.keys() == before.keys()
    for name in ("norm", "small"):
        torch.testing.assert_close(again[name], after[name], atol=2e-3, rtol=1e-3)
    error = again["large"] - after["large"]
    assert error.std() < 0.15 * moved["large"].std() and error.mean().abs() < 1e-6
    with pytest.raises(ValueError, match="this model has not: .'large'"):
        unpack({"norm": before["norm"]}, read_packed(tmp_path))
    with pytest.raises(FileNotFoundError, match="that --pack wrote"):
        read_packed(tmp_path / "nothing")


# ---- the pipeline


def words(out, *more):
    given = ["--tiny", "--out", out, "--projector_steps", 3, "--base_steps", 3, "--base_batch_size", 2]
    given += ["--base_workers", 0, "--steps", 2]
    given += ["--batch_size", 2, "--guided_steps", 2, "--guided_batch_size", 2, "--workers", 0, "--mosaics", 4]
    given += [
        "--adapted_steps",
        2,
        "--adapted_batch_size",
        2,
        "--questions",
        4,
        "--seeds",
        0,
        "--budgets",
        12,
        "--methods",
        "uniform,visionzip",
        "--jobs",
        1,
    ]
    return [str(word) for word in (*given, *more)]


def test_the_whole_pipeline_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    everything = ["--all", "--skip_times", "--adapt_methods", "uniform", "--pack", tmp_path / "packed"]
    main(words(tmp_path, *everything))
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["origin", "uniform", "visionzip", "ours, exactly", "ours, adapted", "uniform, adapted"]
    assert rows["uniform, adapted"]["average_tokens"] == rows["uniform"]["average_tokens"]
    assert rows["ours, adapted"]["average_tokens"] == rows["ours, exactly"]["average_tokens"]
    assert rows["ours, exactly"]["average_tokens"] <= 12 and rows["origin"]["average_tokens"] == 36
    assert rows["ours, exactly"]["best_baseline"] and results["stability"]["12"]["collapsed"] == 0
    assert (tmp_path / "results.png").stat().st_size > 10_000
    (base,) = tmp_path.glob("base-*")
    training = json.loads((base / "training.json").read_text())
    assert [line["stage"] for line in training["log"] if line["step"] == 3] == ["projector", "questions"]
    capfd.readouterr()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    main(words(tmp_path, *everything))
    said = capfd.readouterr().out
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"results.json", "results.csv", "results.png", "times.json"} and " s\n" not in said

    main(words(tmp_path, "--transfer", "--methods", "none", "--pack", tmp_path / "packed"))
    transfer = json.loads((tmp_path / "transfer.json").read_text())["rows"]
    on = {name: [row["method"] for row in transfer if row["set"] == name] for name in ["test", *transfer_sets(TINY)]}
    assert len(on) == 4 and all(rows == ["origin", "ours, exactly", "ours, adapted"] for rows in on.values())

    main(words(tmp_path, "--packed", tmp_path / "packed"))  # the same base without training
    (other,) = {*tmp_path.glob("base-*")} - {base}
    weights = [load_file(folder / "model.safetensors") for folder in (base, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_command_that_can_not_be_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no variant wgan"):
        main(words(tmp_path, "--ablate", "wgan"))
    with pytest.raises(SystemExit, match="numbers separated by commas"):
        main([*words(tmp_path), "--seeds", "a"])


def test_jobs_run_once_and_failures_are_named(tmp_path):
    def job(name, code, expected=None):
        return Job(name, tmp_path / name, ("-c", code), expected)

    good = job("good", f"open({str(tmp_path / 'runs')!r}, 'a').write('x')")
    collapsed = job("collapsed", "raise SystemExit('TrainingCollapsed: far too low')", "TrainingCollapsed")
    assert set(run_jobs([good, collapsed], 2, 0)) == {"good", "collapsed"}
    assert good.record["status"] == "done" and collapsed.record["status"] == "failed"
    assert run_jobs([good, collapsed], 2, 0) == {} and (tmp_path / "runs").read_text() == "x"
    with pytest.raises(RuntimeError, match="(?s)1 of 2 jobs failed: bad.*no such thing"):
        run_jobs([good, job("bad", "raise SystemExit('no such thing')")], 1, 0)
    assert job("bad", "").record is None, "it is run again"


def test_a_failure_shows_beside_a_job_of_the_same_name(tmp_path):
    codes = {"a": "raise SystemExit('no such thing')", "b": "pass"}
    jobs = [Job("same", tmp_path / folder, ("-c", code)) for folder, code in codes.items()]
    with pytest.raises(RuntimeError, match="(?s)1 of 2 jobs failed: same.*no such thing"):
        run_jobs(jobs, 1, 0)


def test_jobs_of_an_ablation_have_names_of_their_own(tmp_path, monkeypatch):
    """Of every seed an adapter, which is a base of its own; other pruners are compared together."""
    variants = (MAIN, "gan", ADAPTED, f"{ADAPTED}_mse")
    plan = Plan((64,), (0, 1), "none", (), 64, variants, 1, 0)
    mini = Mini(tmp_path, REAL, BaseTraining(), TrainingSettings(), DataAmounts(), plan)
    mini.base.mkdir()
    (mini.base / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 30}}))
    mini.base_key, ran = "key", []
    monkeypatch.setattr(pipeline, "run_jobs", lambda jobs, *_: ran.append([job.name for job in jobs]) or {})
    monkeypatch.setattr(results, "write_ablations", lambda *_: None)
    mini.ablations()
    assert all(len({*names}) == len(names) for names in ran)
    lora = [f"{variant}, seed {seed}, on val" for variant in variants[2:] for seed in (0, 1)]
    assert ran[-1] == [f"compare {MAIN}", "compare gan", *lora]


def test_gpus_are_taken_in_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    code = "import os, time; time.sleep(0.5); print('gpu', os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [Job(str(i), tmp_path / str(i), ("-c", code)) for i in range(2)]
    run_jobs(jobs, 2, 2)
    assert {(job.folder / "job.log").read_text() for job in jobs} == {"gpu 5\n", "gpu 7\n"}


def test_variants_differ_in_one_thing_and_fit_the_real_model(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 30}}))
    planned = Trainings(tmp_path, base, "key", tmp_path / "data", REAL, TrainingSettings())
    folders = {}
    for name, variant in VARIANTS.items():
        usual = {**SECOND, **VARIANTS[ADAPTED].prune} if name.startswith(ADAPTED) else SECOND
        usual = usual if variant.start else SCRATCH
        own = {key: value for key, value in variant.prune.items() if usual.get(key) != value}
        assert len(own) + bool(variant.flags) <= 2  # one thing, and what it needs
        folders[name] = planned.plan(name, 64, 0).job.folder
    assert len({*folders.values()}) == len(folders)
    assert planned.plan(MAIN, 32, 0).job.folder == folders[MAIN], "guidance does not know the budget"
    assert planned.plan("gan", 32, 0).job.folder != folders["gan"]
    assert planned.plan("gan", 64, 0).start.folder == folders[MAIN] != planned.plan(MAIN, 64, 1).job.folder
    assert planned.plan("scratch", 64, 0).start is None
    adapted = planned.plan(ADAPTED, 32, 0)
    assert adapted.job.folder == folders[ADAPTED] and adapted.start.folder == folders[MAIN] and adapted.lora
    longer = replace(planned, settings=TrainingSettings(guided_steps=9))
    assert (
        folders[MAIN] != longer.plan(MAIN, 64, 0).job.folder and folders["gan"] != longer.plan("gan", 64, 0).job.folder
    )
    assert chosen("mse,kl") == [MAIN, "mse", "kl"]
    assert PruneConfig.load("mini").floor(576, 30) == 0


def test_the_best_baseline_is_the_one_that_the_intervals_are_of():
    rows = [
        Row("fastv", BASELINE, 64.0, None, average_tokens=64.0, accuracy=0.5),
        Row("tome", BASELINE, 64.0, None, average_tokens=63.0, accuracy=0.5),
        Row("ours", PRUNERS, 64.0, None, average_tokens=64.0, accuracy=1.0),
    ]
    _add_best(rows, [[True, False], [False, True], [True, True]])
    (line,) = results._lines_of_ours([asdict(row) for row in rows], 64.0, Comparison(None, {}))
    assert line["best_baseline"] == rows[2].best_baseline == "tome" and line["versus_best"] == 0.5


def test_intervals():
    assert of_seeds([0.5]) == (0.5, 0.5, 0.5)
    centre, low, high = of_seeds([0.97, 0.98, 0.99])
    assert (centre, high - centre) == (pytest.approx(0.98), pytest.approx(4.303 * 0.01 / 3**0.5))
    assert of_share(0.5, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert of_share(1.0, 100) == (pytest.approx(0.9630, abs=1e-4), pytest.approx(1.0))


@pytest.mark.parametrize("number", [*range(2, 32), 60])
def test_an_interval_of_seeds_holds_95_percent(number):
    values = [float(i) for i in range(number)]
    centre, _, high = of_seeds(values)
    quantile, freedom = (high - centre) / (stdev(values) / number**0.5), number - 1
    # the density of Student's t, integrated
    factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    points = np.linspace(-quantile, quantile, 20_001)
    held = np.trapezoid(factor * (1 + points**2 / freedom) ** (-(freedom + 1) / 2), points)
    assert held == pytest.approx(0.95, abs=1e-4) if number <= 31 else 0.95 <= held < 0.96


# ---- the real parts, where their packages are


def needs(wanted, module):
    found = find_file(wanted) is not None and module in sys.modules or _importable(module)
    return pytest.mark.skipif(not (found and find_file(wanted)), reason=f"{wanted.requirement} or {module} is missing")


def _importable(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


@needs(DINOV2, "onnx")
def test_the_vision_tower_computes_what_the_onnx_file_does(tmp_path, pictures):
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor
    from transformers import Dinov2Model

    from llava_prune.testbed.mini.assemble import DEVIATION, MEAN
    from llava_prune.testbed.mini.vision import write_vision_tower

    mosaic = MosaicSampler(pictures["test"].by_label(), (5, 5), Random(0)).draw("word_at")
    pixels = torch.from_numpy(paint(pictures["test"], mosaic, (5, 5), 44, 224).copy()).permute(2, 0, 1)[None] / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    output = f"/backbone/encoder/layer.{REAL.blocks - 1}/Add_1_output_0"
    model = onnx.load(str(find_file(DINOV2)))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    part = Extractor(model).extract_model(["input_image"], [output])
    expected = ReferenceEvaluator(part).run(None, {"input_image": pixels.numpy()})[0]
    write_vision_tower(tmp_path, 224, REAL.blocks, positions=37)
    with torch.no_grad():
        features = Dinov2Model.from_pretrained(tmp_path)(pixels, output_hidden_states=True).hidden_states[-1]
    assert features.shape == (1, 257, 384) and features.std() > 0.05
    torch.testing.assert_close(features, torch.from_numpy(expected), atol=1e-3, rtol=1e-3)


@needs(DINOV2, "onnx")
def test_position_embeddings_are_resized_once_for_all(tmp_path):
    from transformers import Dinov2Model

    from llava_prune.testbed.mini.vision import write_vision_tower

    towers = []
    for name, positions in (("own", None), ("trained", 37)):
        (tmp_path / name).mkdir()
        write_vision_tower(tmp_path / name, 336, 1, positions)
        towers.append(Dinov2Model.from_pretrained(tmp_path / name))
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, trained = (tower(pixels).last_hidden_state for tower in towers)
    assert own.shape == (1, 577, 384)
    torch.testing.assert_close(own, trained, atol=1e-5, rtol=1e-5)


@needs(SMOLLM2, "gguf")
def test_the_language_model_speaks():
    from llava_prune.testbed.mini.language import load_smollm2

    model, tokenizer = load_smollm2()
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert tokenizer.convert_tokens_to_ids("<image>") == 49152 == len(tokenizer) - 1
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
