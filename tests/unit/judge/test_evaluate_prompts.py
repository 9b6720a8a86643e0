"""Pairs of one prompt are no independent witnesses: what the intervals of `evaluate` say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from fpo_mlx.intervals import wilson  # noqa: E402
from fpo_mlx.judge.evaluate import bootstrap_interval, summarise  # noqa: E402
from fpo_mlx.records import TokenPair  # noqa: E402
from fpo_mlx.train.metrics import ScoredPairs  # noqa: E402

RIGHT, MARGIN = "rewards/accuracies", "rewards/margins"


def told(prompts, hits, margins=None):
    """The summary of pairs of these prompts, by number, that are right or not."""
    answers = np.array([3, 4], np.int32)
    pairs = [TokenPair(np.array([p + 1], np.int32), answers, answers, i)
             for i, p in enumerate(prompts)]  # fmt: skip
    hits = np.asarray(hits, np.float64)
    margins = hits if margins is None else np.asarray(margins, np.float64)
    names = ("policy_accuracy", RIGHT, MARGIN)
    values = dict(zip(names, (hits, hits, margins), strict=True))
    return summarise(values | {"logps/chosen": -1 - margins**2}, ScoredPairs(pairs, []))


def test_six_pairs_of_each_of_four_prompts_all_right_say_what_four_pairs_say():
    summary = told([0, 1, 2, 3] * 6, np.ones(24))
    assert summary[f"{RIGHT}/ci95"] == pytest.approx((0.51, 1.0), abs=0.005)
    assert summary["policy_accuracy/ci95"] == summary[f"{RIGHT}/ci95"]
    assert (summary["n"], summary["prompts"]) == (24, 4)


def test_one_wrong_pair_makes_no_certainty_of_a_few_prompts():
    """Three prompts that are won and one that nearly is go together as four that are won."""
    low, _ = told(sorted([0, 1, 2, 3] * 6), [0.0] + [1.0] * 23)[f"{RIGHT}/ci95"]
    assert 0.4 < low < 0.6


def test_pairs_of_different_prompts_have_exactly_the_intervals_of_pairs():
    rng = np.random.default_rng(0)
    hits, margins = (rng.random(50) < 0.7).astype(np.float64), rng.normal(size=50)
    summary = told(range(50), hits, margins)
    assert summary[f"{RIGHT}/ci95"] == wilson(summary[RIGHT], 50)
    assert summary[f"{MARGIN}/ci95"] == bootstrap_interval(margins)
    low, high = bootstrap_interval(1 + margins**2, weights=np.full(50, 2))
    assert summary["perplexity/chosen/ci95"] != (low, high)  # which is of nats
    assert summary["perplexity/chosen/ci95"] == tuple(
        map(float, np.exp(bootstrap_interval((1 + margins**2) / 2, weights=np.full(50, 2))))
    )
    assert "prompts" not in summary


def test_pairs_that_stand_there_four_times_say_no_more_than_once():
    rng = np.random.default_rng(1)
    hits, margins = (rng.random(40) < 0.7).astype(np.float64), rng.normal(size=40)
    once, often = (told([*range(40)] * n, np.tile(hits, n), np.tile(margins, n)) for n in (1, 4))
    for name in (RIGHT, MARGIN, "perplexity/chosen"):
        assert often[f"{name}/ci95"] == pytest.approx(once[f"{name}/ci95"], rel=1e-9, abs=1e-9)


def test_pairs_of_one_prompt_alone_have_no_interval_that_is_drawn():
    """Drawn again, one prompt is always itself: the interval would have no width."""
    summary = told([0] * 6, np.ones(6), np.arange(6.0))
    assert summary[f"{RIGHT}/ci95"] == pytest.approx(wilson(1.0, 1))
    assert summary["prompts"] == 1
    assert {key for key in summary if key.endswith("ci95")} == {
        f"{RIGHT}/ci95", "policy_accuracy/ci95",
    }  # fmt: skip


@pytest.mark.parametrize("spread", [0.01, 2.0, 1e6])
@pytest.mark.parametrize("count", [8, 40])
def test_intervals_hold_the_true_figures_however_alike_the_pairs_of_a_prompt_are(count, spread):
    """One to six pairs a prompt, alike, partly, not at all. A bootstrap of 8 is too narrow ever."""
    rng, held = np.random.default_rng(2), []
    for _ in range(100):
        sizes = rng.integers(1, 7, count)
        prompts = np.repeat(np.arange(count), sizes)
        chance = rng.beta(0.65 * spread, 0.35 * spread, count)[prompts]
        own = rng.normal(size=count)[prompts] * (spread < 1e6) + rng.normal(size=len(prompts))
        summary = told(prompts, rng.random(len(prompts)) < chance, own)
        true = {RIGHT: 0.65, MARGIN: 0.0}
        held.append([lo <= true[n] <= hi for n in true for lo, hi in [summary[f"{n}/ci95"]]])
    of_shares, of_means = np.mean(held, axis=0)
    assert of_shares >= 0.88  # of 100 draws; 1500 of 40 prompts, spread 2, held 94 %
    assert of_means >= (0.85 if count == 8 else 0.90)


@pytest.mark.parametrize(
    ("sizes", "width"),
    [([1] * 50 + [5] * 50, 0.12), ([1] * 10 + [6] * 10, 0.24), ([1] * 90 + [10], 0.2)],
)
def test_pairs_that_are_independent_count_each_however_many_a_prompt_has(sizes, width):
    """A prompt of one pair is all right or all wrong, which says nothing of how alike pairs are."""
    rng, widths, held = np.random.default_rng(3), [], []
    for _ in range(200):
        hits = rng.random(sum(sizes)) < 0.7
        low, high = told(np.repeat(np.arange(len(sizes)), sizes), hits)[f"{RIGHT}/ci95"]
        widths.append(high - low)
        held.append(low <= 0.7 <= high)
    assert np.mean(widths) < width
    assert np.mean(held) >= 0.9
