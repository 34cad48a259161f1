"""Fits on remembered passes: they learn, they ask what origin is asked, and they leave the model as it was."""

import json

import pytest
import torch

from llava_prune.guidance import guidance_of
from llava_prune.layout import IGNORE_INDEX
from llava_prune.patch import attach_pruners, find_handle
from llava_prune.testbed.mini.__main__ import main
from llava_prune.testbed.mini.fits import FITS, Fit, Fits, chosen_fits
from llava_prune.testbed.mini.size import TINY

LEARNER = Fit({"pruner_lr": 3e-3}, steps=40, batch_size=16)
RESIDUAL = Fit({"use_attn_residual": True}, steps=2, batch_size=2)
SPARE = Fit({"min_keep": 6}, steps=2, batch_size=2)  # 36 tokens in layer 0, at least 6 in three others: 13.5


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini")
    few = {"projector_steps": 3, "base_steps": 3, "base_batch_size": 2, "base_workers": 0, "mosaics": 4}
    words = [part for name, value in few.items() for part in (f"--{name}", str(value))]
    main(["--tiny", "--out", str(out), "--questions", "8", *words])
    (base,), (data,) = out.glob("base-*"), out.glob("data-*")
    named = {"ours": LEARNER, "attn_residual": RESIDUAL, "spare": SPARE, "layers_1_8_16_24": FITS["layers_1_8_16_24"]}
    return Fits(base, data, out, TINY, named, samples=24, asked=8, workers=0)


def test_what_does_not_fit_the_base_is_left_out(fits):
    assert list(fits.configs) == ["ours", "attn_residual", "spare"]
    with pytest.raises(ValueError, match="--fit: no fit fastest; use all, or some of ours, longer"):
        chosen_fits("ours,fastest")
    assert chosen_fits("all") == FITS


def test_a_fit_learns_what_is_remembered(fits):
    config, losses = fits.configs["ours"], []
    lessons = {layer: lesson.without_attention() for layer, lesson in fits.memory.drawn(200).items()}
    for steps in (0, 40):
        pruners = fits.fitted(Fit(steps=steps, batch_size=16), config, seed=0)
        with torch.no_grad():
            losses.append(guidance_of({int(layer): pruner for layer, pruner in pruners.items()}, lessons).item())
    assert len(fits.memory) == 24 and losses[1] < losses[0] - 0.01


def test_who_keeps_all_is_right_where_origin_is(fits):
    """The questions are given the answers that this untrained base likes best."""
    config = fits.configs["ours"]
    pruners = fits.fitted(LEARNER, config, seed=0)
    for batch, _ in fits.questions:
        with torch.no_grad():
            likeliest = fits.model(**batch).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        labels.copy_(torch.where(labels == IGNORE_INDEX, labels, likeliest))
    with torch.no_grad(), attach_pruners(fits.model, config):
        assert fits.answered("origin", {}) == 1
    for who in (pruners, None):
        assert fits.right(config, who, TINY.vision_tokens) == 1
    assert find_handle(fits.model) is None


def test_what_is_lost_is_left_out_with_a_message(fits, capsys):
    lost, fine = (fits.fitted(Fit(steps=1, batch_size=2), fits.configs["ours"], seed) for seed in (0, 1))
    next(lost.parameters()).data.fill_(torch.nan)
    assert fits._not_lost("ours", {0: lost, 1: fine}) == [fine]
    assert "ours: left out, seeds [0]" in capsys.readouterr().out


def test_a_run_writes_every_fit_and_seed_at_every_budget_above_its_floor(fits):
    rows = fits.run(seeds=(0, 1))
    assert rows == json.loads((fits.out / "fits.json").read_text())
    names = ["origin", "true slopes", "ours", "attn_residual", "spare"]
    assert [row["fit"] for row in rows] == names
    assert [len(row["right"]["18"]) for row in rows] == [1, 1, 2, 2, 2]
    assert all(list(row["right"]) == [str(budget) for budget in TINY.budgets] for row in rows[:4])
    assert all(list(row["right"]) == ["18"] for row in rows[4:]), "12 tokens are too few"
