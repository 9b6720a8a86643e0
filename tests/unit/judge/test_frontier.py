"""Scales between measured ones, and the largest that keeps a bound."""

from __future__ import annotations

import pytest

from fpo_mlx.judge.frontier import CLOSE, SMALLEST, largest_scale, scale_at


def test_a_power_of_the_scale_is_met_exactly_between_its_points():
    scales = [1.0, 0.25, 0.5]
    assert scale_at(scales, [8 * s**2 for s in scales], 0.98) == pytest.approx(0.35)


@pytest.mark.parametrize("target", [0.1, 9.0])
def test_a_target_outside_of_what_was_measured_has_no_scale(target):
    assert scale_at([0.25, 1.0], [0.5, 8.0], target) is None


@pytest.mark.parametrize("wanted", [0.9, 0.5, 0.05, 0.002])
def test_the_largest_scale_within_a_bound_is_found_by_bisection(wanted):
    """A small one was known to within 1/256 of the whole, twice itself at worst."""
    asked: list[float] = []

    def kl(scale: float) -> float:
        asked.append(scale)
        return 40 * scale**2

    scale, value = largest_scale(kl, 40 * wanted**2)
    assert wanted / (1 + CLOSE) <= scale <= wanted
    assert value == kl(scale)
    assert len(set(asked)) <= 18


def test_an_adapter_within_the_bound_is_taken_whole():
    assert largest_scale(lambda s: 3 * s, 5.0) == (1.0, 3.0)


def test_a_bound_that_nothing_keeps_takes_nothing():
    asked: list[float] = []
    assert largest_scale(lambda s: asked.append(s) or 7.0, 5.0) == (0.0, 0.0)
    assert min(asked) == SMALLEST
