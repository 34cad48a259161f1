"""What `compare` says of two methods on the same questions: exact p values, intervals, rows."""

from itertools import product

import numpy as np
import pytest

from llava_prune.comparing.cells import BASELINE, ORIGIN, PRUNERS, Cell, Method
from llava_prune.comparing.plot import spread
from llava_prune.comparing.questions import Question
from llava_prune.comparing.statistics import Difference, bootstrap_interval, compare, mcnemar
from llava_prune.comparing.summary import summarise
from llava_prune.comparing.table import best_baselines, columns, probability

# ---- McNemar's exact test


@pytest.mark.parametrize("better,worse", product(range(6), repeat=2))
def test_p_is_the_share_of_coin_falls_at_least_as_uneven(better, worse):
    flips = better + worse
    falls = [abs(2 * sum(coins) - flips) for coins in product((0, 1), repeat=flips)]
    assert mcnemar(better, worse) == np.mean([fall >= abs(better - worse) for fall in falls])


# scipy.stats.binomtest(better, better + worse).pvalue of scipy 1.17.1
@pytest.mark.parametrize(
    "better,worse,p",
    [(10, 2, 0.03857421875), (121, 59, 4.4344492637551645e-06), (1000, 1100, 0.03072070786424249), (0, 0, 1.0)],
)
def test_p_is_that_of_scipys_binomial_test(better, worse, p):
    assert mcnemar(better, worse) == pytest.approx(p, rel=1e-12) == mcnemar(worse, better)


def test_p_does_not_overflow():
    assert 0 < mcnemar(300, 5) < 1e-80 and mcnemar(20_000, 20_500) == pytest.approx(0.013153825113145, rel=1e-9)


# ---- paired bootstrap


@pytest.mark.parametrize("better,worse,questions", [(20, 5, 100), (3, 40, 600), (0, 2, 48), (7, 7, 30)])
def test_interval_is_that_of_questions_drawn_with_replacement(better, worse, questions):
    values = np.array([1] * better + [-1] * worse + [0] * (questions - better - worse))
    drawn = values[np.random.default_rng(1).integers(0, questions, (10_000, questions))].mean(1)
    expected = np.quantile(drawn, [0.025, 0.975])
    assert np.allclose(bootstrap_interval(better, worse, questions), expected, atol=1.001 / questions)


def test_interval_repeats_with_its_seed_and_widens_with_its_level():
    assert bootstrap_interval(30, 10, 200, seed=3) == bootstrap_interval(30, 10, 200, seed=3)
    low, high = bootstrap_interval(30, 10, 200)
    lower, higher = bootstrap_interval(30, 10, 200, level=0.999)
    assert lower < low < 0.1 < high < higher
    assert bootstrap_interval(0, 0, 200) == (0, 0) and bootstrap_interval(200, 0, 200) == (1, 1)


def test_only_questions_that_one_of_both_got_right_count():
    first, second = [True, True, False, True, False], [False, False, False, True, True]
    found = compare(first, second)
    assert found.difference == pytest.approx(0.2) and found.p == mcnemar(2, 1) and found.low <= 0.2 <= found.high
    assert compare(first, first) == Difference(0, 0, 0, 1)
    for second in ([True], []):
        with pytest.raises(ValueError, match="every question"):
            compare(first[: len(second) - 1], second)


# ---- rows

QUESTIONS = [Question(i, "what?", None, answer) for i, answer in enumerate("abcd")]


def result(answers, tokens, **times):
    figures = {"tokens_per_layer": tokens, "llm_flops": 1e9 * sum(tokens)}
    entries = [{"question_id": i, "answer": text, **figures} for i, text in enumerate(answers)]
    return {"reason": None, "questions": entries, "times_ms": {"prefill": times} if times else {}}


def rows_of(origin=None, **cells):
    """Rows of origin (abcx, 16 tokens if not given) and `name=(kind, budget, result)`."""
    origin = (Cell(Method(ORIGIN, ORIGIN), None), origin or result("abcx", [16, 16]))
    others = [(Cell(Method(name, kind), budget), value) for name, (kind, budget, value) in cells.items()]
    return summarise(*zip(*[origin, *others], strict=True), QUESTIONS)


def test_figures_of_a_row_by_hand():
    origin, row = rows_of(ours=(PRUNERS, 8, result(["A.", "x", "c", "d"], [12, 4])))
    assert (origin.accuracy, origin.of_origin, origin.agreement, origin.average_tokens) == (0.75, 1, 1, 16)
    assert origin.versus_origin is None
    assert (row.accuracy, row.of_origin, row.agreement, row.average_tokens) == (0.75, 1, 0.5, 8)
    assert row.versus_origin.difference == 0 and row.versus_origin.p == mcnemar(1, 1)
    assert row.best_baseline is None


def test_trained_pruners_are_held_against_the_best_baseline_of_their_budget():
    rows = rows_of(
        weak=(BASELINE, 8, result("axxx", [8, 8])),
        wide=(BASELINE, 8, result("abxx", [8, 8])),
        thrifty=(BASELINE, 8, result("xxcd", [8, 4])),  # as accurate with fewer tokens
        larger=(BASELINE, 12, result("abcd", [12, 12])),
        empty=(BASELINE, 8, {"reason": "floor of 9"}),
        ours=(PRUNERS, 8, result("abcx", [8, 8])),
        own=(PRUNERS, None, result("abcd", [9, 9])),
    )
    assert [row.method for row in rows] == ["origin", "larger", "ours", "thrifty", "wide", "weak", "empty", "own"]
    found = {row.method: row for row in rows}
    assert found["ours"].best_baseline == "thrifty" and found["ours"].versus_best.difference == 0.25
    assert found["ours"].versus_best.p == mcnemar(2, 1)
    assert found["own"].versus_best is None and found["weak"].versus_best is None
    assert found["empty"].accuracy is None and found["empty"].reason == "floor of 9"
    assert best_baselines(rows) == {8: ("thrifty", 0.5)}


def test_an_origin_without_a_right_answer_has_no_share():
    _, row = rows_of(result("xxxx", [16, 16]), ours=(PRUNERS, 8, result("abcd", [8, 8])))
    assert row.of_origin is None and row.accuracy == 1


def test_times_stand_beside_origins_of_the_same_turns():
    origin, slow, fast = rows_of(
        result("abcd", [16, 16], origin=10.0),
        slow=(BASELINE, 8, result("abcd", [8, 8], origin=90.0, hard=45.0)),
        fast=(BASELINE, 4, result("abcd", [4, 4], origin=12.0, hard=5.0)),
    )
    assert (origin.prefill_ms, origin.prefill_origin_ms) == (12, None)  # the median over the cells
    assert (slow.prefill_ms, slow.prefill_origin_ms, slow.first_token_ms) == (45, 90, None)
    assert columns(fast)["prefill,\nms"] == "5.0 / 12.0" and columns(origin)["prefill,\nms"] == "12.0"


def test_small_p_are_not_shown_as_zero():
    assert [probability(Difference(0, 0, 0, p)) for p in (1e-9, 0.0123, 1.0)] == ["<0.001", "0.012", "1.000"]


def test_labels_are_spread_without_leaving_the_picture():
    assert spread([0.1, 0.5], 0.04) == [0.1, 0.5]
    assert np.allclose(spread([0.5, 0.5, 0.52], 0.1), [0.4066667, 0.5066667, 0.6066667])
    for places in ([0.99] * 4, [0.0, 0.01, 0.02], [i / 100 for i in range(40)], [0.3]):
        moved = spread(places, 0.05)
        step = min(0.05, 1 / max(len(places) - 1, 1))
        assert min(moved) >= 0 and max(moved) <= 1 + 1e-9
        assert all(b - a > step - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
