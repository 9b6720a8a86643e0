"""Which pairs are taken for the same."""

from __future__ import annotations

import pytest

from fpo_mlx.pairs.doubles import finder
from fpo_mlx.pairs.settings import BuildConfig


def test_equal_and_nearly_equal_pairs_are_found():
    pytest.importorskip("datasketch")
    words = [f"w{n}" for n in range(100)]
    is_new = finder(0.8, lambda _: None)
    assert is_new([" ".join(words), "x"])
    assert not is_new([" ".join(words), " x "])
    assert not is_new([" ".join([*words[:-1], "other"]), "x"])
    assert is_new([" ".join(words[::-1]), "x"])
    exact = finder(1, lambda _: None)
    assert exact([" ".join(words), "x"])
    assert exact([" ".join([*words[:-1], "other"]), "x"])


@pytest.mark.parametrize("threshold", [0.001, 0.95, 0.97, 0.99, 0.999])
def test_any_similarity_that_the_settings_take_can_be_asked_for(threshold):
    """From 0.97 on datasketch found too few bands: a traceback, after all had been judged."""
    pytest.importorskip("datasketch")
    is_new = finder(BuildConfig(near_duplicates=threshold).near_duplicates, lambda _: None)
    words = [f"w{n}" for n in range(100)]
    assert is_new([" ".join(words), "x"])
    assert not is_new([" ".join(words).upper(), "x"])
    assert is_new([" ".join(words[::-1]), "x"])
