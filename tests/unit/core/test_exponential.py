"""The exponential of the vocabulary tiles against float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_mlx.core.exponential import LEAST, exp_below


def relative_error(values: np.ndarray, top: float) -> float:
    got = np.array(exp_below(mx.array(values), mx.array(top)), dtype=np.float64)
    difference = (values - np.float32(top)).astype(np.float64)  # the float32 difference is given
    return float(np.abs(got / np.exp(difference) - 1).max())


def test_it_is_exact_to_float32_over_its_whole_range() -> None:
    assert relative_error(np.linspace(LEAST, 0, 200_001, dtype=np.float32), 0.0) < 2e-7


@given(st.lists(st.floats(-60, 0, width=32), min_size=1, max_size=40), st.floats(-20, 20))
@settings(max_examples=60)
def test_it_is_exact_for_any_values_below_any_top(values: list[float], top: float) -> None:
    shifted = np.array(values, dtype=np.float32) + np.float32(top)
    assert relative_error(np.minimum(shifted, np.float32(top)), top) < 2e-7


def test_the_top_itself_gives_one_and_far_below_it_nothing() -> None:
    found = exp_below(mx.array([[5.0, -1e4, -mx.inf]]), mx.array([[5.0]]))
    assert found[0, 0].item() == 1.0
    assert 0 <= found[0, 1].item() < 2e-38
    assert 0 <= found[0, 2].item() < 2e-38


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(broken: float) -> None:
    found = exp_below(mx.array([broken, 0.0]), mx.array(broken))
    assert mx.isnan(found).tolist()[0]


def test_every_row_has_its_own_top() -> None:
    values = mx.array([[0.0, 1.0, 2.0], [-3.0, -5.0, -3.0]])
    found = exp_below(values, values.max(axis=-1, keepdims=True))
    expected = np.exp([[-2.0, -1.0, 0.0], [0.0, -2.0, 0.0]])
    np.testing.assert_allclose(np.array(found), expected, rtol=2e-7)
