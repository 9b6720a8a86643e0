"""scripts/studies/control.py: which features stand in for others, and what the rates are."""

from __future__ import annotations

import control
import numpy as np
import pytest


def test_the_twin_of_a_feature_is_the_nearest_in_activation_that_tells_nothing():
    lists, prose = np.zeros((4, 6)), np.zeros((4, 6))
    lists[:, 0], lists[:, 1] = 2.0, 3.0  # tell lists: fire there alone
    both = np.array([1.0, 2.0, 3.0, 4.0])
    for i, size in ((2, 0.44), (3, 0.7), (4, 5.0)):  # the same on both sets
        lists[:, i], prose[:, i] = size * both, size * both
    lists[:, 5], prose[:, 5] = 1.8, 0.2  # nearest of all in activation, but tells lists
    found = control.twins([0, 1], lists, prose)
    assert [(one["feature"], one["in_place_of"]) for one in found] == [(2, 0), (3, 1)]
    assert [one["auc"] for one in found] == [0.5, 0.5]
    assert found[0]["activation"] == pytest.approx(1.1)
    assert found[1]["its_activation"] == pytest.approx(1.5)


def test_a_twin_serves_one_feature_only():
    lists, prose = np.zeros((2, 4)), np.zeros((2, 4))
    lists[:, :2] = 2.0
    lists[:, 2:], prose[:, 2:] = [1.0, 9.0], [1.0, 9.0]
    assert [one["feature"] for one in control.twins([0, 1], lists, prose)] == [2, 3]


def test_a_twin_lies_as_near_to_what_is_named_and_was_not_taken_before():
    """Of 2, 3 and 4, in this order of nearness, 2 lies elsewhere and 3 is another's."""
    lists, prose = np.zeros((2, 5)), np.zeros((2, 5))
    lists[:, 0] = 2.0
    lists[:, 2:], prose[:, 2:] = [1.0, 1.5, 9.0], [1.0, 1.5, 9.0]
    figure = (np.array([0.3, 0.0, 0.5, 0.31, 0.29]), 0.1)
    for along, taken, twin in ((None, (), 2), (figure, (), 3), (figure, (3,), 4)):
        (one,) = control.twins([0], lists, prose, along=along, taken=taken)
        assert one["feature"] == twin
    with pytest.raises(SystemExit, match="no feature lies as near"):
        control.twins([0], lists, prose, along=(figure[0], 0.001))


def test_a_feature_is_no_twin_of_its_own():
    same = np.array([[1.0, 2.0, 3.0]] * 4)
    assert [one["feature"] for one in control.twins([0], same, same)] == [1]


def test_rates_and_differences_are_means_over_seeds_and_prompts():
    lists = {
        "base": [0, 0, 0, 1],
        "free": [1, 1, 0, 1],
        "held": [0, 0, 0, 1],
        "others": [1, 1, 0, 0],
    }
    right = {"free": [1, 1, 1, 1], "held": [1, 1, 1, 0], "others": [1, 0, 1, 1]}
    runs = [
        {"kind": kind, "seed": seed, "lists": lists[kind], "right": right.get(kind, [])}
        | {name: seed + i for i, name in enumerate(control.MEASURED)}
        for seed in (0, 1)
        for kind in lists
    ]
    found = control.verdict(runs)
    assert found["lists/free"]["rate"] == 0.75
    assert found["lists/free - base"]["points"] == 50
    assert found["lists/held - others"]["points"] == -25
    assert found["accuracy/held - free"]["points"] == -25
    assert found["within 5 points"] == {"lists": True, "accuracy": False}
    assert found["rewards/margins/held"] == {"mean": 0.5, "seeds": [0, 1]}
    low, high = found["lists/held - base"]["ci95"]
    assert low == high == 0  # the same answers at every prompt: nothing to resample
    assert found["lists/free - base"]["t"] == [50, 50]  # both seeds alike
