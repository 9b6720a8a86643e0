"""What pairs teach: planted features are found and no others, labels planted wrong come first."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_mlx.intervals import of_groups, wilson, witnesses
from fpo_mlx.judge import cover, lessons, logistic
from fpo_mlx.judge.feature_report import auc
from fpo_mlx.judge.logistic import SparseRows
from fpo_mlx.records import ResponseScore, SparseFeatures, TokenPair

# Sparse rows --------------------------------------------------------------------------------------

matrices = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).choice([0.0, 0.0, 1.0, -2.5, 3.0], size=(5, 7))
)


@given(a=matrices, b=matrices)
@settings(max_examples=30)
def test_sparse_rows_say_what_the_dense_ones_say(a, b):
    x, y, every = SparseRows.of_dense(a), SparseRows.of_dense(b), np.arange(7)
    np.testing.assert_array_equal(x.dense(every), a)
    np.testing.assert_array_equal(x.minus(y).dense(every), a - b)
    np.testing.assert_array_equal(x.beside(y).dense(np.arange(14)), np.hstack([a, b]))
    picks = np.array([3, 0, 3])
    np.testing.assert_array_equal(x.take(picks).dense(np.array([6, 1])), a[picks][:, [6, 1]])
    np.testing.assert_allclose(x.sums(np.arange(5.0), np.square), np.arange(5.0) @ a**2)
    np.testing.assert_array_equal(x.seen(), (a != 0).sum(axis=0))
    assert (x.minus(x).values != 0).sum() == 0


def test_a_column_that_stands_twice_in_a_row_is_summed():
    x = SparseRows.of([(np.array([4, 1, 4]), np.array([1.0, 2.0, 0.5]))], 6)
    assert x.dense(np.arange(6)).tolist() == [[0, 2, 0, 0, 1.5, 0]]


# The regression -----------------------------------------------------------------------------------


def test_the_regression_by_hand():
    """Three of four rows are 1, one is -1; without penalty w is the log-odds: ln 3."""
    x = np.array([[1.0], [1.0], [1.0], [-1.0]])
    assert logistic.ridge(x, 1e-9)[0] == pytest.approx(math.log(3), abs=1e-6)


@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([0.01, 1.0, 30.0]))
@settings(max_examples=25)
def test_the_regression_lies_where_its_slope_is_zero(seed, penalty):
    """The loss is strictly convex, so this is the one minimum; slopes by plain loops."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, 4)) * rng.uniform(0.1, 5, size=4)
    w = logistic.ridge(x, penalty)
    for j in range(4):
        slope = penalty * w[j]
        for row in x:
            slope -= row[j] / (1 + math.exp(min(row @ w, 500)))
        assert abs(slope) < 1e-4


def test_the_score_test_of_signs_is_the_sign_test_by_hand():
    """Of 100 differences 60 are +1: slope (60 - 40) / 2, variance 100 / 4, z = 2."""
    x = SparseRows.of_dense(np.array([[1.0]] * 60 + [[-1.0]] * 40))
    z = logistic.score_test(x, np.zeros((100, 0)))
    assert z[0] == pytest.approx(2.0)
    assert logistic.two_sided(z)[0] == pytest.approx(0.0455, abs=1e-4)


def test_the_score_test_beside_others_is_the_likelihood_ratio_near_zero():
    """Against a slow oracle: twice the gain of the log-likelihood by two fits, signs and all."""
    rng = np.random.default_rng(1)
    z0 = rng.normal(size=(4000, 2))
    x = 0.6 * z0[:, :1] + rng.normal(size=(4000, 3))
    prefers = rng.random(4000) < logistic.sigmoid(0.4 * z0[:, 0] + 0.12 * x[:, 0] - 0.1 * x[:, 2])
    sign = np.where(prefers, 1.0, -1.0)[:, None]
    z0, x = z0 * sign, x * sign
    found = logistic.score_test(SparseRows.of_dense(x), z0)

    def fitted(columns):
        w = logistic.ridge(columns, 1e-6)
        return -np.logaddexp(0.0, -(columns @ w)).sum(), w[-1]

    least = fitted(z0)[0]
    for j in range(3):
        best, w = fitted(np.hstack([z0, x[:, j : j + 1]]))
        assert found[j] == pytest.approx(math.copysign(math.sqrt(2 * (best - least)), w), abs=0.03)


def test_a_column_that_the_given_ones_hold_tells_nothing_more():
    rng = np.random.default_rng(0)
    given = rng.normal(size=(50, 2))
    x = SparseRows.of_dense(given @ np.array([[2.0], [-1.0]]))
    assert logistic.score_test(x, given)[0] == 0.0


def test_false_discovery_rates_by_hand():
    """m = 3, 1 + 1/2 + 1/3 = 11/6: 0.001 * 5.5, 0.01 * 5.5 / 2, 0.4 * 5.5 / 3."""
    q = logistic.false_discovery(np.array([0.01, 0.4, 0.001]))
    np.testing.assert_allclose(q, [0.0275, 0.4 * 5.5 / 3, 0.0055])
    assert logistic.false_discovery(np.array([0.02, 0.01, 0.9]))[0] == pytest.approx(0.055)


def test_no_prompt_is_in_two_folds():
    groups = [bytes([i % 7]) for i in range(40)]
    folds = logistic.folds_of(groups, 3)
    assert all(len({f for f, g in zip(folds, groups, strict=True) if g == n}) == 1 for n in groups)
    assert set(folds.tolist()) == {0, 1, 2}


# Planted pairs ------------------------------------------------------------------------------------

F, MATTER = 300, {3: 1, 5: -1, 7: 1}  # feature -> sign; 7 goes with length, and 9 does no more


def planted(seed: int, n: int = 800, noise: float = 0.1) -> tuple[lessons.PairFeatures, np.ndarray]:
    """Pairs whose preference three features decide, but for a share of labels that are flipped."""
    rng = np.random.default_rng(seed)
    length = rng.integers(20, 200, size=(n, 2))
    a = np.maximum(rng.normal(size=(n, 2, F)) - 0.8, 0)
    for feature in (7, 9):
        a[:, :, feature] = np.maximum(0.02 * (length - 110) + 0.5 * rng.normal(size=(n, 2)), 0)
    score = 3 * a[:, :, 3] - 3 * a[:, :, 5] + 2 * a[:, :, 7]
    wrong = rng.random(n) < noise
    first = np.where((score[:, 0] > score[:, 1]) ^ wrong, 0, 1)
    rows = np.arange(n)
    chosen, rejected = a[rows, first], a[rows, 1 - first]
    x = lessons.PairFeatures(
        SparseRows.of_dense(chosen),
        SparseRows.of_dense(rejected),
        (F,),
        np.stack([length[rows, first], length[rows, 1 - first]], axis=1),
        SparseRows.of_dense(rng.normal(size=(n, 5))),
        tuple(i.to_bytes(2, "big") for i in range(n)),
    )
    return x, wrong


def test_planted_features_are_found_exactly_at_a_tenth_of_wrong_labels_in_20_seeds():
    """Those with a part of their own are the three; what else is found stays below the rate."""
    false = every = 0
    for seed in range(20):
        x, _ = planted(seed)
        found, tested = lessons.discover(x, x.difference, 0.05)
        assert {one.feature: math.copysign(1, one.z) for one in found if one.own} == MATTER, seed
        assert tested == F
        false += sum(one.feature not in MATTER for one in found)
        every += len(found)
    assert false / every <= 0.05


def test_pairs_that_teach_nothing_have_no_lessons():
    for seed in range(20):
        x, _ = planted(seed, noise=0.5)
        assert lessons.discover(x, x.difference, 0.05)[0] == ()


def test_rows_of_one_prompt_are_one_witness():
    """As of four answers each against each: what repeats proves nothing more."""
    blind = 0
    for seed in range(20):
        x, _ = planted(seed, n=150, noise=0.5)
        rows = np.tile(np.arange(150), 6)
        again = lessons.PairFeatures(
            x.chosen.take(rows), x.rejected.take(rows), x.sizes, x.lengths[rows],
            x.words.take(rows), tuple(x.groups[i] for i in rows),
        )  # fmt: skip
        assert lessons.discover(again, again.difference, 0.05)[0] == ()
        others = replace(again, groups=tuple(i.to_bytes(2, "big") for i in range(len(rows))))
        blind += len(lessons.discover(others, others.difference, 0.05)[0])
    assert blind > 20, "else this proves nothing"


def test_rows_that_stand_twice_explain_no_less_and_prove_no_more():
    x, _ = planted(0)
    rows = np.tile(np.arange(len(x)), 4)
    again = lessons.PairFeatures(
        x.chosen.take(rows), x.rejected.take(rows), x.sizes, x.lengths[rows],
        x.words.take(rows), tuple(x.groups[i] for i in rows),
    )  # fmt: skip
    one, four = lessons.learn(x), lessons.learn(again)
    assert {f.feature for f in four.found} == {f.feature for f in one.found} != set()
    for a, b in zip(one.found, four.found, strict=True):
        assert b.explained == pytest.approx(a.explained, rel=0.01)
        assert b.z == pytest.approx(a.z, rel=0.2), "and not twice as much"
    hits = np.array([1.0, 1.0, 0.0, 1.0])
    groups = (b"a", b"b", b"c", b"d")
    assert witnesses(hits.tolist(), groups) == 4
    assert witnesses(hits.tolist() * 6, groups * 6) == pytest.approx(4)
    assert witnesses([1.0] * 6, groups[:2] * 3) == 2
    widths = [p.ci95[1] - p.ci95[0] for found in (one, four) for p in found.predictors]
    assert max(widths[4:]) > 0.8 * min(widths[:4])


def test_the_variance_of_groups_is_the_slow_one():
    rng = np.random.default_rng(4)
    n, groups = 60, tuple(bytes([i % 7]) for i in range(60))
    dense = rng.normal(size=(n, 3)) * (rng.random((n, 3)) < 0.6)
    dense[:, 0] += np.array([g[0] - 3 for g in groups])
    given = rng.normal(size=(n, 2))
    found = logistic.score_test(SparseRows.of_dense(dense), given, groups)
    unit = given / np.sqrt((given**2).mean(axis=0))
    p = 1 / (1 + np.exp(-unit @ logistic.ridge(unit, 1e-3)))
    inner = (unit * (p * (1 - p))[:, None]).T @ unit
    larger = 0
    for column, z in zip(dense.T, found, strict=True):
        weights = np.linalg.solve(inner, (unit * (p * (1 - p))[:, None]).T @ column)
        rest = column - unit @ weights
        sums = [sum(((1 - p) * rest)[i] for i in range(n) if groups[i] == g) for g in set(groups)]
        plain, robust = (p * (1 - p) * rest**2).sum(), sum(np.square(sums))
        larger += robust > plain
        wanted = ((1 - p) * column).sum() / max(plain, robust) ** 0.5
        assert z == pytest.approx(wanted, rel=1e-6)
    assert larger > 0


def test_the_strongest_of_many_weak_features_has_nobody_stronger():
    rng = np.random.default_rng(0)
    x, _ = planted(0)
    dense = rng.normal(size=(len(x), F))
    dense *= np.sign(dense[:, :30].sum(axis=1))[:, None]
    found, _ = lessons.discover(x, SparseRows.of_dense(dense), 0.05)
    assert len(found) > 10
    assert found[0].own


def test_a_feature_that_only_goes_with_length_is_found_without_length_beside_it():
    """So that the test above is one: 9 would be found by whoever forgets length."""
    x, _ = planted(0)
    alone = logistic.score_test(x.difference, np.zeros((len(x), 0)))
    assert alone[9] > 5
    beside = logistic.score_test(x.difference, x.length_columns)
    assert abs(beside[9]) < 3
    assert beside[7] > 4


def test_a_shadow_of_a_feature_is_found_and_said_to_follow_it():
    x, _ = planted(1)
    dense = x.difference.dense(np.arange(F))
    dense[:, 200] = 0.8 * dense[:, 3] + 0.1 * np.random.default_rng(0).normal(size=len(x))
    with_shadow = SparseRows.of_dense(dense)
    found, _ = lessons.discover(x, with_shadow, 0.05)
    (shadow,) = [one for one in found if one.feature == 200]
    (true,) = [one for one in found if one.feature == 3]
    assert (true.own, shadow.own) in ((True, False), (False, True))
    follower, leader = (shadow, true) if true.own else (true, shadow)
    assert follower.follows == (0, leader.feature)
    assert follower.correlation > 0.9


def test_the_whole_of_planted_pairs_beside_length_words_and_their_wrong_labels():
    x, wrong = planted(0)
    found = lessons.learn(x)
    by_name = {p.name: p for p in found.predictors}
    assert by_name["features"].accuracy > by_name["length"].accuracy + 0.1
    assert by_name["features"].accuracy < 0.93, "a tenth of the labels cannot be foretold"
    low, high = by_name["bag of words"].ci95
    assert low < 0.5 < high, "words that were drawn by chance tell nothing"
    assert by_name["bag of words"].explained < 0.02
    unlikely = 1 - found.probability
    assert auc(unlikely[wrong], unlikely[~wrong]) >= 0.9
    assert found.length_z > 3, "the longer answer is preferred, by way of feature 7"
    weights = dict(zip(found.fitted.columns.tolist(), found.fitted.weights, strict=True))
    assert all(weights[feature] * sign > 0 for feature, sign in MATTER.items())


def test_effects_and_wins_by_hand():
    """Differences 1, 1, 1, -1, 0 five times over: mean 0.4, sd of 25 about 0.816, wins 3 of 4."""
    moved = np.array([[1.0], [1], [1], [-1], [0]] * 5)
    zero = SparseRows.of_dense(np.zeros((25, 1)))
    x = lessons.PairFeatures(
        SparseRows.of_dense(moved), zero, (1,), np.full((25, 2), 9), zero,
        tuple(bytes([i]) for i in range(25)),
    )  # fmt: skip
    found, tested = lessons.discover(x, x.difference, 0.5)
    assert tested == 1
    (one,) = found
    assert (one.win_rate, one.differs) == (0.75, 20)
    assert one.effect_size == pytest.approx(0.4 / moved.std(ddof=1))
    assert one.z == pytest.approx((15 - 5) / 2 / math.sqrt(20 / 4))


def test_few_pairs_and_few_prompts_are_refused():
    x, _ = planted(0, n=19)
    with pytest.raises(ValueError, match="19 pairs of 19 prompts; wanted 20 pairs"):
        lessons.learn(x)


def test_the_features_of_pairs_stand_sae_after_sae():
    pair = TokenPair(np.array([1]), np.array([2, 2, 3]), np.array([4]), index=0)

    def score(first, second):
        return ResponseScore(-1.0, 1, tuple(
            SparseFeatures(np.array([i], np.int32), np.array([v], np.float32))
            for i, v in (first, second)))  # fmt: skip

    x = lessons.pair_features([pair], [(score((0, 1.0), (1, 2.0)), score((2, 3.0), (1, 5.0)))],
                              [3, 4])  # fmt: skip
    assert x.difference.dense(np.arange(7)).tolist() == [[1, 0, -3, 0, -3, 0, 0]]
    assert [x.name(i) for i in (0, 2, 3, 6)] == [(0, 0), (0, 2), (1, 0), (1, 3)]
    assert [x.column(*x.name(i)) for i in range(7)] == list(range(7))
    np.testing.assert_allclose(
        x.words.dense(np.arange(5)), [[0, 0, math.log(3), math.log(2), -math.log(2)]]
    )
    np.testing.assert_allclose(x.length_columns, [[2.0, math.log(3)]], rtol=1e-15)


def test_words_are_the_tokens_of_the_responses_in_which_a_feature_is_strong():
    responses = [np.array([1, 5]), np.array([1, 6])] * 6
    activations = np.array([2.0, 0.0] * 6)
    assert lessons.Presence.of(responses).words(activations, 3) == [5]
    assert lessons.Presence.of(responses).words(activations, 3, least=7) == []


def test_examples_lie_for_and_against():
    assert lessons.examples_of(np.array([0.0, 3, -1, 2]), +2.0, 2) == ([1, 3], [2])
    assert lessons.examples_of(np.array([0.0, 3, -1, 2]), -2.0, 2) == ([2], [1, 3])


def test_wilsons_interval_of_9_in_10_is_the_published_one():
    assert wilson(0.9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)


def test_groups_count_for_as_many_answers_as_they_vary_like():
    """One at the least, where all of a group's go one way; all of them at the most."""
    assert of_groups([1.0, 0.0, 1.0, 1.0], 1) == wilson(0.75, 4)
    assert of_groups([1.0, 0.5, 0.0, 1.0], 1) == wilson(0.625, 4)  # a tie
    assert of_groups([1.0, 0.0] * 20, 4) == wilson(0.5, 40)
    assert of_groups([0.5] * 40, 4) == wilson(0.5, 160)
    # with a won and a lost one beside them: mean 0.5, variance 0.125, half of 0.25
    low, high = of_groups([0.25, 0.75], 4)
    near = np.var([0.25, 0.75, 1, 0])
    assert (low, high) == pytest.approx(wilson(0.5, 2 * 0.25 / near))


@pytest.mark.parametrize("most", [1, 4])
def test_all_of_a_few_groups_are_no_certainty(most):
    assert of_groups([1.0] * 3, most) == pytest.approx((0.438, 1.0), abs=1e-3)


def test_an_interval_over_groups_holds_the_true_share_95_times_of_100():
    """Prompts of four answers, alike within a prompt (all, partly, not at all), few and many."""
    rng, held = np.random.default_rng(0), []
    for count in (5, 40):
        for spread in (0.01, 2.0, 1e6):
            for _ in range(300):
                chance = rng.beta(0.65 * spread, 0.35 * spread, count)
                low, high = of_groups(rng.binomial(4, chance) / 4, 4)
                held.append(low <= 0.65 <= high)
    assert np.mean(held) > 0.94


# Rows ---------------------------------------------------------------------------------------------


def test_near_doubles_are_those_of_a_look_at_every_two():
    rng = np.random.default_rng(3)
    dense = np.maximum(rng.normal(size=(60, 400)) - 1, 0)
    for copy, of in ((7, 3), (50, 3), (40, 41)):
        dense[copy] = dense[of] * 2 + 0.02 * rng.random(400)
    dense[11] = 0
    unit = dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    wanted = [(i, j) for i, j in itertools.combinations(range(60), 2) if unit[i] @ unit[j] >= 0.97]
    found = cover.near_doubles(SparseRows.of_dense(dense), 0.97)
    assert [(i, j) for i, j, _ in found] == wanted == [(3, 7), (3, 50), (7, 50), (40, 41)]
    for i, j, cosine in found:
        assert cosine == pytest.approx(unit[i] @ unit[j])


def test_near_doubles_take_no_memory_for_features_that_no_row_has():
    """With a sign for each of them an SAE of a million features took 6 GB."""
    columns = np.array([3, 10**9, 5, 3, 10**9], np.int64)
    values = np.array([1.0, 2.0, 1.0, 2.0, 4.0])
    rows = SparseRows(np.array([0, 2, 3, 5]), columns, values, 10**12)
    for seed in (0, 1):
        ((i, j, cosine),) = cover.near_doubles(rows, 0.97, seed)
        assert (i, j, cosine) == (0, 2, pytest.approx(1.0))


@given(sets=st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=9),
       count=st.integers(1, 9))  # fmt: skip
def test_a_cover_is_the_slow_greedy_one(sets, count):
    chosen, covered = [], set()
    while len(chosen) < min(count, len(sets)):
        left = [i for i in range(len(sets)) if i not in chosen]
        gains = {i: len(set(sets[i]) - covered) for i in left}
        best = max(left, key=lambda i: (gains[i], -i))
        if not gains[best] and covered:
            covered = set()
            continue
        chosen.append(best)
        covered |= set(sets[best])
    assert cover.cover([np.array(one, dtype=np.int64) for one in sets], count) == chosen


def test_the_strongest_columns_go_by_magnitude():
    rows = SparseRows.of_dense(np.array([[1.0, -5, 0, 2], [0, 0, 0, 0]]))
    assert [one.tolist() for one in cover.strongest(rows, 2)] == [[1, 3], []]
