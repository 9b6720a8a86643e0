"""What names an SAE in a reference cache: all that changes its features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fpo_mlx.records import HASHED_ROWS, SaeWeights

SIZE = HASHED_ROWS + 44  # rows of every array: more than are hashed at once
VECTORS = ("b_enc", "b_in", "threshold", "gate_scale", "gate_bias", "act_scale")
OTHERS = {"activation": "relu", "k": 3, "normalize": "layer_norm"}


@pytest.fixture(scope="module")
def whole():
    """Every array set, whether or not an activation reads all of them."""
    numbers = np.arange(SIZE, dtype=np.float32)
    arrays = {name: numbers + at for at, name in enumerate(VECTORS)}
    return SaeWeights("topk", np.ones((SIZE, SIZE), np.float32), k=2, **arrays)


@pytest.mark.parametrize("name", ["w_enc", *VECTORS, *OTHERS])
def test_one_changed_number_of_what_encodes_makes_another_fingerprint(whole, name):
    value = OTHERS.get(name)
    if value is None:
        value = getattr(whole, name).copy()
        value[-1] += 1
    assert replace(whole, **{name: value}).fingerprint() != whole.fingerprint()


def test_the_decoder_and_the_name_leave_the_fingerprint(whole):
    other = replace(whole, w_dec=whole.w_enc, b_dec=whole.b_in, source="elsewhere")
    assert other.fingerprint() == whole.fingerprint()
