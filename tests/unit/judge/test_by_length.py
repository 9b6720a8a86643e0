"""The figures of `evaluate` by the length of the answers, by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from fpo_mlx.judge.evaluate import BY_LENGTH, STRATA, _by_length  # noqa: E402


def test_by_hand_a_pair_counts_by_its_chosen_length_and_by_which_answer_is_longer():
    """One pair in each third; by the rejected lengths they would fall elsewhere. The last is even.

    The pairs' own values are 1, 10 and 100, so a mean says which of them it is of.
    """
    values = {name: np.array([1.0, 10.0, 100.0]) for name in BY_LENGTH}
    found = _by_length(values, np.array([[9, 2, 5], [1, 20, 5]]))
    assert found["share_chosen_longer"] == pytest.approx(1 / 3)
    wanted = {"chosen_longer": 1.0, "chosen_not_longer": 55.0}
    wanted |= {"short": 10.0, "middle": 100.0, "long": 1.0}
    for name in BY_LENGTH:
        assert {group: found[f"{name}/{group}"] for group in wanted} == wanted
    assert [found[f"tokens/{name}"] for name in STRATA] == [(2, 2), (5, 5), (9, 9)]
    assert [found[f"n/{name}"] for name in STRATA] == [1, 1, 1]


def test_pairs_of_one_length_are_all_in_one_third_and_the_others_have_no_figures():
    found = _by_length({name: np.ones(2) for name in BY_LENGTH}, np.array([[4, 4], [5, 5]]))
    assert [found[f"n/{name}"] for name in STRATA] == [2, 0, 0]
    assert found["tokens/long"] is None
    assert found["rewards/margins/long"] is None
    assert found["rewards/margins/chosen_longer"] is None
