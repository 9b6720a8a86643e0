"""The numpy encoder by hand, and the number formats that it rests on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.convert import to_bfloat16
from fpo_mlx.sae.encode import decode, encode
from fpo_mlx.sae.tensorfile import widen_bfloat16


def identity(**parts) -> SaeWeights:
    """Features are the inputs themselves: pre = x."""
    parts = {"activation": "relu", "w_enc": np.eye(4), "b_enc": np.zeros(4)} | parts
    arrays = {k: v.astype(np.float32) if isinstance(v, np.ndarray) else v for k, v in parts.items()}
    return SaeWeights(**arrays)


X = np.array([[3.0, -4.0, 1.0, 2.0]], dtype=np.float32)
BY_HAND = [
    ("relu", {}, [3, 0, 1, 2]),
    ("relu", {"b_enc": np.array([-3.0, 5, -2, 1])}, [0, 1, 0, 3]),
    ("relu", {"b_in": np.array([1.0, -5, 0, 0])}, [2, 1, 1, 2]),
    ("relu", {"act_scale": np.array([2.0, 2, 0, 0.5])}, [6, 0, 0, 1]),
    # strict, not subtracted, and never negative even with a negative threshold
    ("jumprelu", {"threshold": np.array([3.0, -9, 0.5, 1.5])}, [0, 0, 1, 2]),
    # the gate sees raw + gate_bias, the value raw * scale + bias; a gate of exactly 0 is shut
    (
        "gated",
        {
            "gate_scale": np.array([2.0, 2, 2, 2]),
            "gate_bias": np.array([0.0, 9, -1, -1]),
            "b_enc": np.array([1.0, 9, 1, -9]),
        },
        [7, 1, 0, 0],
    ),
    ("topk", {"k": 2}, [3, 0, 0, 2]),
    ("topk", {"k": 4}, [3, 0, 1, 2]),  # fewer than k when fewer are positive
    ("abstopk", {"k": 2}, [3, -4, 0, 0]),
    ("groupmax", {"k": 2}, [3, 0, 0, 2]),
]


@pytest.mark.parametrize(("activation", "parts", "wanted"), BY_HAND)
def test_activations_by_hand(activation: str, parts: dict, wanted: list[float]):
    np.testing.assert_array_equal(encode(identity(activation=activation, **parts), X), [wanted])


def test_layer_norm_divides_by_the_unbiased_deviation_plus_epsilon():
    # mean 0.5; deviations 2.5, -4.5, 0.5, 1.5: squares sum to 29, over n - 1 = 3
    std = (29 / 3) ** 0.5 + 1e-5
    got = encode(identity(normalize="layer_norm"), X)
    np.testing.assert_allclose(got, [[2.5 / std, 0, 0.5 / std, 1.5 / std]], rtol=1e-6)


def test_constant_norm_gives_every_token_the_length_root_d():
    got = encode(identity(normalize="constant_norm"), X)
    np.testing.assert_allclose(got, np.maximum(X, 0) * 2 / 30**0.5, rtol=1e-6)


def test_a_transcoders_output_is_not_scaled_back():
    sae = identity(normalize="constant_norm", w_dec=np.eye(4), b_dec=np.ones(4))
    acts = encode(sae, X)
    back = decode(sae, acts, X)
    np.testing.assert_allclose(back, (acts + 1) * 30**0.5 / 2, rtol=1e-6)
    np.testing.assert_allclose(decode(replace(sae, transcoder=True), acts, X), acts + 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 2, 4)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(SaeError, match=r"wanted \[N, 4\]"):
        encode(identity(), np.zeros(shape, np.float32))


@pytest.mark.parametrize("activation", ["relu", "topk", "groupmax"])
def test_a_token_is_encoded_alike_alone_and_among_thousands(activation: str):
    rng = np.random.default_rng(0)
    sae = identity(activation=activation, k=2)
    x = rng.standard_normal((5000, 4)).astype(np.float32)  # more than one chunk of rows
    together = encode(sae, x)
    for row in (0, 2047, 2048, 4999):
        np.testing.assert_array_equal(encode(sae, x[row : row + 1])[0], together[row])


def test_no_rows_give_no_activations():
    assert encode(identity(), np.zeros((0, 4), np.float32)).shape == (0, 4)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(finite.filter(lambda v: abs(v) < 3e38))
def test_bfloat16_is_the_nearest_of_its_two_neighbours(value: float):
    x = np.array([value], dtype=np.float32)
    got = widen_bfloat16(to_bfloat16(x))
    low = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # towards zero
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    distances = np.abs(np.array([low, high]).astype(np.float64) - x.astype(np.float64))
    assert abs(float(got[0]) - value) == distances.min()


@given(st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80))
def test_every_bfloat16_number_survives_the_way_there_and_back(bits: int):
    array = np.array([bits], dtype=np.uint16)
    assert to_bfloat16(widen_bfloat16(array))[0] == bits
