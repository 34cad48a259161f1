"""Training-free baselines: exact budgets, the law of the pruners, the way back, and the commands that take them."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from launch import environment
from tiny import batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, detach_pruners, last_report, prune_mode, save_pruners
from llava_prune.baselines import METHODS, attach_baseline
from llava_prune.reporting.command import main as run_report
from llava_prune.run import attach_as_asked
from llava_prune.run import main as run_program

MIXED = ([9, 14, 7, 11], [1, 0, 2, 1])
IN_DECODER = ("fastv", "pyramiddrop", "sparsevlm", "vtw")
BEFORE_DECODER = tuple(name for name in METHODS if name not in IN_DECODER)
SELECTING = ("random", "uniform", "visionzip", "divprune")


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def generated(model, batch, **how):
    images = {"attention_mask": batch["attention_mask"], "images": batch["images"]}
    return model.generate(batch["input_ids"], **images, max_new_tokens=8, **(how or {"do_sample": False}))


# ---- the law, the budget, the way back


@pytest.mark.parametrize(("attention", "side", "kv_heads"), [("sdpa", "right", 4), ("eager", "left", 2)])
@pytest.mark.parametrize("name", METHODS)
def test_masked_equals_hard(tower_folder, name, attention, side, kv_heads):
    model = tiny_llava(tower_folder, attention=attention, padding_side=side, kv_heads=kv_heads)
    batch = batch_of(*MIXED, side)
    stock = logits(model, batch)
    results, reports, words = [], [], []
    with attach_baseline(model, name, average_tokens=9) as handle:
        for mode in ("masked", "hard"):
            with prune_mode(model, mode):
                results.append(logits(model, batch))
                reports.append(last_report(model))
                layout = handle.state.record.layout
                words.append([generated(model, batch), generated(model, batch, num_beams=3)])
        with prune_mode(model, "origin"):
            assert torch.equal(logits(model, batch), stock)
            assert last_report(model).average_tokens.tolist() == [16, 0, 32, 16]
    assert (results[0] - results[1])[layout.text].abs().max() < 1e-4
    if name in IN_DECODER:
        assert (stock - results[1])[layout.text_after_image].abs().max() > 1e-2, "nothing was dropped"
    for masked, hard in zip(*words, strict=True):
        assert torch.equal(masked, hard)
    for report in reports:
        assert report.vision_tokens.tolist() == [16, 0, 32, 16]
        assert torch.equal(report.tokens_per_layer, reports[0].tokens_per_layer)
        for layer, kept in report.kept.items():
            assert all(torch.equal(a, b) for a, b in zip(kept, reports[0].kept[layer], strict=True))
    if name in SELECTING:
        assert [len(kept) for kept in reports[1].kept[0]] == [9, 0, 18, 9]


@pytest.mark.parametrize("average", [6.5, 9, 15.9])
@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_met(llava, name, average):
    """Never exceeded, and short by less than a token; pooling has whole rows and columns, VTW whole layers."""
    with attach_baseline(llava, name, average_tokens=average):
        logits(llava, batch_of([9, 9], [1, 2]))
        report = last_report(llava)
    assert report.average_tokens[0] == pytest.approx(report.tokens_per_layer[0].float().mean().item())
    for images, reached in enumerate(report.average_tokens.tolist(), start=1):
        least = {"vtw": average - 16 / 6, "pooling": {6.5: 6, 9: 9, 15.9: 12}[average] - 1}.get(name, average - 1)
        assert images * least < reached <= images * average + 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_alone_is_a_sample_in_a_batch(llava, name):
    batch = batch_of(*MIXED)
    with attach_baseline(llava, name, average_tokens=9) as handle:
        together = logits(llava, batch)
        kept, text = last_report(llava).kept, handle.state.record.layout.text
        for row, (first, last) in enumerate([(0, 1), (1, 2), (2, 4), (4, 5)]):  # a picture for the sample without, too
            alone = {
                "input_ids": batch["input_ids"][row][batch["attention_mask"][row]][None],
                "images": batch["images"][first:last],
            }
            here = logits(llava, alone)[0]
            if row == 1:
                torch.testing.assert_close(here, together[row, : len(here)], atol=1e-4, rtol=0)
                continue
            words = handle.state.record.layout.text[0]
            torch.testing.assert_close(here[words], together[row][text[row]], atol=1e-4, rtol=0)
            for layer, rows in last_report(llava).kept.items():
                assert torch.equal(rows[0], kept[layer][row])


@pytest.mark.parametrize("name", IN_DECODER)
def test_prompts_that_end_in_their_picture_are_pruned_alike_in_every_mode(llava, name):
    """Without a question the last token that is left ranks the others."""
    batch = batch_of([2] * 6 + [9], [1] * 7)
    results, kept = [], []
    with attach_baseline(llava, name, average_tokens=7 if name == "fastv" else 4) as handle:
        for mode in ("masked", "hard"):
            with prune_mode(llava, mode):
                results.append(logits(llava, batch))
                kept.append(last_report(llava).kept)
        layout = handle.state.record.layout
    assert layout.question.sum(-1).tolist() == [0] * 6 + [7]
    assert (results[0] - results[1])[layout.text].abs().max() < 1e-4
    for layer, rows in kept[0].items():
        assert all(torch.equal(*pair) for pair in zip(rows, kept[1][layer], strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_of_everything_is_the_stock_model(llava, name):
    batch = batch_of(*MIXED)
    stock = logits(llava, batch)
    with attach_baseline(llava, name, average_tokens=16):
        for mode in ("masked", "hard"):
            with prune_mode(llava, mode):
                assert torch.equal(logits(llava, batch), stock)
            assert last_report(llava).average_tokens.tolist() == [16, 0, 32, 16]


@pytest.mark.parametrize(
    ("name", "budget", "floor"),
    [("fastv", 5.9, "6"), ("pyramiddrop", 3, "3.5"), ("sparsevlm", 3, "3.5"), ("vtw", 2.6, "2.66667")]
    + [(name, 0.9, "1") for name in BEFORE_DECODER],
)
def test_a_budget_under_the_floor_is_refused_with_the_floor(llava, name, budget, floor):
    before = dict(llava.__dict__)
    with pytest.raises(ValueError, match=f"{name}: {budget} average tokens are under its floor of {floor} "):
        attach_baseline(llava, name, average_tokens=budget)
    assert llava.__dict__ == before and "forward" not in llava.get_model().layers[-1].__dict__
    with attach_baseline(llava, name, average_tokens=float(floor) + 1e-4):
        logits(llava, batch_of([9], [1]))
        assert last_report(llava).average_tokens.item() == pytest.approx(float(floor), abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_detach_leaves_nothing(llava, name):
    batch = batch_of(*MIXED)
    stock = logits(llava, batch)

    def traces():
        modules = llava.named_modules()
        return [(key, set(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks)) for key, m in modules]

    before = traces()
    attach_baseline(llava, name, average_tokens=9)
    assert not torch.equal(logits(llava, batch), stock)
    assert not any(True for parameter in llava.get_model().llava_pruners.parameters())
    detach_pruners(llava)
    assert traces() == before and torch.equal(logits(llava, batch), stock)


def test_what_does_not_suit_is_refused(llava, tower_folder, tmp_path):
    with pytest.raises(ValueError, match="use one of random, uniform"):
        attach_baseline(llava, "fastV", average_tokens=9)
    with pytest.raises(ValueError, match="must be a positive number"):
        attach_baseline(llava, "fastv", average_tokens=0)
    with pytest.raises(ValueError, match="at least 1"):
        attach_baseline(llava, "fastv", average_tokens=9, layer=0)
    with pytest.raises(ValueError, match="origin, masked, hard"):
        attach_baseline(llava, "fastv", average_tokens=9, mode="soft")
    with attach_baseline(llava, "fastv", average_tokens=9):
        with pytest.raises(ValueError, match="detach_pruners"):
            attach_baseline(llava, "vtw", average_tokens=9)
        with pytest.raises(ValueError, match="no weights"):
            save_pruners(llava, tmp_path)
        with pytest.raises(ValueError, match="origin, masked, hard"), prune_mode(llava, "soft"):
            pass
    anyres = tiny_llava(tower_folder)
    anyres.config.image_aspect_ratio = "anyres"
    for name in (*BEFORE_DECODER, "vtw"):
        with pytest.raises(ValueError, match="any resolution"):
            attach_baseline(anyres, name, average_tokens=9)


# ---- the commands


@pytest.fixture(scope="module")
def answered(testbed, tmp_path_factory):
    """The testbed's test questions answered through LLaVA's own program with two baselines at once."""
    out, base, running = tmp_path_factory.mktemp("out"), testbed / "llava-mosaic-tiny", {}
    for name in ("fastv", "divprune"):
        arguments = ["run", "--baseline", name, "--average_tokens", "50.5", "--report", out / f"{name}.report.jsonl"]
        arguments += ["-m", "llava.eval.model_vqa_loader", "--model-path", base, "--image-folder", testbed]
        arguments += ["--question-file", testbed / "test.jsonl", "--answers-file", out / f"{name}.jsonl"]
        arguments += ["--temperature", "0", "--conv-mode", "v1"]
        command = [sys.executable, "-m", "llava_prune", *map(str, arguments)]
        running[name] = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    for process in running.values():
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    return out


@pytest.mark.parametrize(("name", "layer", "average"), [("fastv", "2", (2 * 144 + 6 * 19) / 8), ("divprune", "0", 50)])
def test_run_answers_with_a_baseline_and_reports_what_it_kept(answered, testbed, name, layer, average):
    questions = [json.loads(line) for line in (testbed / "test.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (answered / f"{name}.jsonl").read_text().splitlines()]
    report = [json.loads(line) for line in (answered / f"{name}.report.jsonl").read_text().splitlines()]
    assert [a["question_id"] for a in answers] == [q["question_id"] for q in questions]
    assert len(report) == len(questions)
    for line in report:
        assert line["mode"] == "hard" and line["vision_tokens"] == 144 and line["llm_flops"] > 0
        assert line["average_tokens"] == pytest.approx(average)
        assert list(line["kept"]) == [layer] and len(line["kept"][layer]) == line["tokens_per_layer"][-1]
    assert len({tuple(line["kept"][layer]) for line in report}) > 1


def test_run_says_what_is_wrong(llava, capsys):
    for message, arguments in {
        "baseline 'fastv' needs average_tokens": ["--baseline", "fastv"],
        "not allowed with": ["--baseline", "fastv", "--pruners", "x"],
        "needs pruners": [],
        "invalid choice": ["--baseline", "fast"],
    }.items():
        with pytest.raises(SystemExit) as left:
            run_program([*arguments, "-m", "program"])
        assert message in capsys.readouterr().err + str(left.value)
    asked = Namespace(pruners=None, baseline="fastv", mode="hard", average_tokens=3, allow_other_base=False)
    with pytest.raises(SystemExit, match="llava_prune: fastv: 3 average tokens are under its floor of 6 "):
        attach_as_asked(asked, llava)


@pytest.mark.parametrize(("name", "average"), [("vtw", 36), ("pooling", 40)])
def test_report_measures_a_baseline(testbed, tmp_path, capsys, name, average):
    arguments = ["--model", testbed / "llava-mosaic-tiny", "--baseline", name, "--average_tokens", 41, "--number", 1]
    arguments += ["--json", tmp_path / "report.json", "--new_tokens", 2, "--warmup", 0, "--repeats", 1]
    run_report(list(map(str, arguments)))
    result = json.loads((tmp_path / "report.json").read_text())
    origin, hard = result["modes"]["origin"], result["modes"]["hard"]
    assert (origin["average_tokens"], hard["average_tokens"]) == (144, average)
    assert hard["vision_tokens"] == 144 and hard["kv_bytes"]["computed"] == hard["kv_bytes"]["measured"]
    assert f"{name}, " in capsys.readouterr().out
    for message, wrong in {"needs --average_tokens": [], "leave out --pruners": ["--pruners", str(testbed)]}.items():
        with pytest.raises(SystemExit, match=message):
            run_report(["--model", str(testbed / "llava-mosaic-tiny"), "--baseline", name, *wrong])


def test_run_gives_trained_pruners_a_budget_too(llava, tmp_path):
    config = PruneConfig(pruning_layers=(1, 3), target_token_num=12, pruner_dim=16, pruner_heads=4)
    with attach_pruners(llava, config) as handle:
        randomise_pruners(handle)
        save_pruners(llava, tmp_path)
    asked = Namespace(
        baseline=None, pruners=tmp_path, mode="hard", allow_other_base=False, average_tokens=8, fast=False
    )
    attach_as_asked(asked, llava)
    logits(llava, batch_of([9], [1]))
    assert last_report(llava).average_tokens.item() == 8
