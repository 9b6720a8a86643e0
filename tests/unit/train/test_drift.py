"""The controller of alpha: by hand, on a plant that is worked out, and to the bit after a stop."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from fpo_mlx.config import PRESETS, Objective
from fpo_mlx.errors import ConfigError
from fpo_mlx.train.drift import (
    FIRST,
    HURRY,
    INTEGRAL,
    PULL,
    S_ABOVE,
    S_BELOW,
    SHORTEST,
    TREND,
    Controller,
)


def test_by_hand_at_the_target_alpha_stays_and_above_it_alpha_rises():
    start = Controller.for_drift(0.1)
    assert start.alpha == FIRST["drift"]
    at = start.after(0.01)  # 0.1 squared
    assert at.alpha == pytest.approx(30.0, rel=1e-12)
    above = start.after(0.01 * math.e)
    assert above.level == pytest.approx(30.0 * math.exp(INTEGRAL + HURRY))
    assert above.alpha == pytest.approx(above.level * math.e)


def test_by_hand_a_drift_that_doubles_is_met_by_more_alpha_and_one_that_halves_by_less():
    """Means of two figures: (.9 a + b) / 1.9 and (.95 a + b) / 1.95; g is their ratio's log."""
    for second in (0.02, 0.005):
        after = Controller.for_drift(0.1).after(0.01).after(second)
        fast, slow = (0.9 * 0.01 + second) / 1.9, (0.95 * 0.01 + second) / 1.95
        assert after.trend == pytest.approx(math.log(fast / slow), rel=1e-9)
        swing = math.log(fast / 0.01) + TREND * math.log(fast / slow)
        assert after.alpha == pytest.approx(after.level * math.exp(swing), rel=1e-9)
        assert (swing > math.log(fast / 0.01)) == (second > 0.01)


def test_a_kl_of_roundings_size_and_of_either_sign_has_no_trend():
    drift = Controller.begin("kl", 3.0)
    for value in (-1e-6, 1.02e-6, -1e-6, 1e-6, 2e-6):
        drift = drift.after(value)
        assert math.isfinite(drift.alpha)


def test_the_running_mean_has_no_bias_towards_zero():
    drift = Controller.begin("kl", 5.0)
    start = drift.alpha
    for _ in range(3):
        drift = drift.after(5.0)
    assert drift.fast.value == pytest.approx(5.0)
    assert drift.slow.value == pytest.approx(5.0)
    assert drift.alpha == pytest.approx(start)


def test_far_from_the_target_alpha_is_bounded_by_its_swing():
    far, near = Controller.for_drift(0.1).after(100.0), Controller.for_drift(0.1).after(1e-9)
    assert far.alpha == pytest.approx(far.level * math.exp(S_ABOVE))
    assert near.alpha == pytest.approx(near.level * math.exp(-S_BELOW))


def test_the_level_does_not_wind_down_while_the_drift_still_grows():
    drift = start = Controller.for_drift(0.3)
    for n in range(1, 40):
        drift = drift.after((0.002 * n) ** 2)
    assert drift.fast.value < 0.3**2
    assert drift.level > 0.35 * start.level  # winding down all the way would leave 0.065
    stuck = drift
    for _ in range(60):
        stuck = stuck.after(drift.fast.value)
    assert stuck.level < 0.3 * drift.level


def test_at_the_start_the_constraint_weighs_no_more_at_the_target_than_at_any_time():
    assert Controller.begin("kl", 1.0).alpha == FIRST["kl"]
    assert Controller.begin("kl", 5.0, PULL["response"]).alpha == FIRST["kl"]
    assert Controller.begin("kl", 10.0).alpha == pytest.approx(PULL["token"] / 10.0)
    assert Controller.for_drift(0.3).alpha == FIRST["drift"]
    assert Controller.for_drift(0.5).alpha == pytest.approx(PULL["token"] / 0.25)


def test_nothing_moved_yet_leaves_alpha_where_it_began():
    assert Controller.for_drift(0.1).after(0.0).alpha == FIRST["drift"]


def plant(seed: int, rate: float, pull: float, target: float, updates: int = 160) -> float:
    """Mean drift over the last 30 updates, as part of the target.

    Adapters of size x move by rate * tanh(pull - alpha x); relative D of a pair is x squared times
    noise of a factor e^0.5.
    """
    noise, drift = random.Random(seed), Controller.for_drift(target)
    x, seen = 0.0, []
    for _ in range(updates):
        x += rate * math.tanh(pull - drift.alpha * x)
        drift = drift.after(x * x * math.exp(noise.gauss(-0.125, 0.5)))
        seen.append(x / target)
    return sum(seen[-30:]) / 30


@pytest.mark.parametrize("target", [0.05, 0.1])
@pytest.mark.parametrize("rate", [0.002, 0.005, 0.02])
@pytest.mark.parametrize("pull", [1.0, 5.0])
def test_it_settles_within_a_tenth_of_the_target_at_any_rate_and_pull(target, rate, pull):
    means = [plant(seed, rate, pull, target) for seed in range(8)]
    assert sum(means) / len(means) == pytest.approx(1.0, abs=0.1)


def swings(rate: float, target: float, updates: int = 320) -> float:
    """Root mean square of (drift over target - 1) from update 120 on, where Adam takes the steps.

    200 adapters are pulled by .01 with noise of twice that; pairs' drifts scatter by e^0.6.
    """
    noise, drift = np.random.default_rng(0), Controller.for_drift(target)
    x, mean, square = (np.zeros(200) for _ in range(3))
    seen = []
    for n in range(1, updates + 1):
        pair = math.exp(noise.normal(-0.18, 0.6))
        gradient = 0.01 + noise.normal(0, 0.02, 200) - drift.alpha * x * pair / 200
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        x += drift.part * rate * (mean / (1 - 0.9**n)) / np.sqrt(square / (1 - 0.999**n))
        drift = drift.after(float((x**2).mean()) * pair)
        seen.append(float(np.sqrt((x**2).mean())) / target)
    return float(np.sqrt(np.mean((np.array(seen[120:]) - 1) ** 2)))


@pytest.mark.parametrize(("rate", "target"), [(0.005, 0.1), (0.01, 0.1), (0.01, 0.2)])
def test_it_does_not_swing_around_its_target_though_the_optimizer_answers_late(rate, target):
    assert swings(rate, target) < 0.18  # .24 to .31 without the trend and with an I of .07


def restless(
    rate: float, target: float, updates: int = 300, start: float = 0.0
) -> tuple[float, Controller]:
    """(drift at the end over the target, the controller) where steps are noise.

    200 adapters move by their rate whatever the size of their gradient, as Adam's do: along the
    pull, against the constraint, and by noise of twice the pull. start: drift over the target.
    """
    noise, drift = np.random.default_rng(0), Controller.for_drift(target)
    x, seen = np.full(200, start * target), []
    for _ in range(updates):
        gradient = 0.01 + noise.normal(0, 0.02, 200) - drift.alpha * x / 200
        x += drift.part * rate * np.tanh(gradient / 0.01)
        drift = drift.after(float((x**2).mean()))
        seen.append(float(np.sqrt((x**2).mean())) / target)
    return sum(seen[-50:]) / 50, drift


def test_a_target_below_what_the_steps_cause_is_met_by_smaller_steps():
    drift, controller = restless(rate=0.2, target=0.05)
    assert drift == pytest.approx(1.0, abs=0.1)
    assert controller.part < 0.6
    assert controller.alpha * controller.target == pytest.approx(PULL["token"], rel=0.2)


def test_a_target_that_alpha_can_hold_leaves_the_steps_whole():
    drift, controller = restless(rate=0.01, target=0.1)
    assert drift == pytest.approx(1.0, abs=0.1)
    assert controller.part == 1.0


@pytest.mark.parametrize(
    ("start", "rate"), [(3.0, 0.002), (3.0, 0.005), (10.0, 0.005), (3.0, 0.2), (10.0, 0.2)]
)
def test_a_drift_far_above_its_target_comes_back_and_is_held(start, rate):
    drift, _ = restless(rate, target=0.05, updates=1200, start=start)
    assert drift == pytest.approx(1.0, abs=0.1)


def test_a_sum_over_a_response_may_be_held_by_a_constraint_of_many_nats():
    """KL x^2 / 2 per response, pulled by a margin of 4 x: at KL 15 alpha is .73, 11 nats of it."""
    drift = Controller.begin("kl", 15.0, PULL["response"])
    x, seen = 0.0, []
    for _ in range(400):
        x += 0.1 * math.tanh(4.0 - drift.alpha * x)
        drift = drift.after(x * x / 2)
        seen.append(x * x / 2)
    assert sum(seen[-50:]) / 50 == pytest.approx(15.0, rel=0.05)
    assert drift.part == 1.0
    assert drift.alpha == pytest.approx(4.0 / math.sqrt(30.0), rel=0.1)


def test_the_user_is_told_once_however_often_the_steps_become_short():
    drift, told = Controller.for_drift(0.3), []
    for value in [1.0] * 60 + [1e-4] * 200 + [1.0] * 60:
        after = drift.after(value)
        told.append(after.told and not drift.told)
        drift = Controller.loaded(
            json.loads(json.dumps(after.saved())), Objective(target_drift=0.3)
        )
    assert sum(told) == 1


def test_an_overshoot_that_falls_by_itself_hardly_shortens_the_steps():
    drift = Controller.for_drift(0.3)
    for n in range(25):
        drift = drift.after(0.92**n)
    assert drift.fast.value > 2 * drift.target
    assert drift.part > 0.5, "25 updates that do not fall leave 0.17"


def test_a_state_of_before_alpha_had_a_bound_gets_one():
    saved = Controller.for_drift(0.05).saved() | {"level": 1e7}
    del saved["shortest"]
    assert Controller.loaded(saved, Objective(target_drift=0.05)).part == 1.0


def test_neither_alpha_nor_the_steps_wind_up_against_a_drift_that_nothing_moves():
    drift = Controller.for_drift(0.1)
    for _ in range(2000):
        drift = drift.after(1.0)
    assert drift.alpha == pytest.approx(5 * PULL["token"] / 0.01)
    assert drift.part == pytest.approx(SHORTEST)
    for _ in range(120):
        drift = drift.after(1e-4)
    assert drift.part == 1.0


def test_a_saved_controller_goes_on_to_the_bit():
    drift = Controller.for_drift(0.1)
    for n in range(1, 30):
        drift = drift.after(0.013 * math.sin(n) ** 2)
    again = Controller.loaded(json.loads(json.dumps(drift.saved())), Objective(target_drift=0.1))
    assert again == drift
    assert again.after(0.02).alpha == drift.after(0.02).alpha


def test_only_an_objective_with_a_target_has_a_controller():
    assert Controller.of(Objective()) is None
    drift = Controller.of(Objective(target_drift=0.2))
    assert drift is not None
    assert drift.target == pytest.approx(0.04)
    kl = Controller.of(Objective(**PRESETS["tdpo2"], target_kl=3.0))
    assert kl is not None
    assert kl.target == 3.0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"target_drift": 0.0}, r"--target-drift 0: wanted 1e-06 to 1e\+06"),
        ({"target_drift": 1e-200}, r"--target-drift 1e-200: wanted 1e-06 to 1e\+06"),
        ({"target_drift": 1e200}, r"--target-drift 1e\+200: wanted 1e-06 to 1e\+06"),
        ({"constraint": "kl", "target_kl": 1e308}, r"--target-kl 1e\+308: wanted 1e-06 to"),
        ({"target_drift": 0.1, "constraint": "none"}, "--target-drift needs a constraint"),
        ({"target_kl": 1.0}, "--target-kl needs --constraint kl"),
    ],
)
def test_a_target_that_cannot_be_held_is_refused(settings, part):
    with pytest.raises(ConfigError, match=part):
        Objective(**settings)
