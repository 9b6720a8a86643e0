"""Sums by feature against the dense product."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_mlx.core import sparse_sums


@given(
    n=st.integers(1, 40), k=st.integers(1, 6), features=st.integers(6, 50),
    piece=st.integers(1, 60), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_sums_by_feature_are_the_dense_product(n, k, features, piece, seed) -> None:
    rng = np.random.default_rng(seed)
    favoured = rng.random(features) ** 4  # some features have most entries, some none
    draw = rng.random((n, features)) * favoured
    index = np.argsort(-draw, axis=1)[:, :k].astype(np.int32)
    values = [rng.standard_normal((n, k)).astype(np.float32) for _ in range(2)]
    rows = [rng.standard_normal((n, 5)).astype(np.float32) for _ in range(2)]
    sparse_sums.ENTRIES = piece
    try:
        entries = sparse_sums.by_feature(mx.array(index), features)
        pairs = [(mx.array(v), mx.array(r)) for v, r in zip(values, rows, strict=True)]
        found = sparse_sums.sums(entries, pairs, k)
    finally:
        sparse_sums.ENTRIES = 1024
    for v, r, got in zip(values, rows, found, strict=True):
        dense = np.zeros((n, features))
        np.put_along_axis(dense, index, v, axis=1)
        np.testing.assert_allclose(np.array(got), dense.T @ r, rtol=1e-5, atol=1e-5)


def test_pieces_cover_every_feature_once_and_are_small() -> None:
    index = mx.array(np.random.default_rng(0).integers(0, 300, size=(500, 8)))
    entries = sparse_sums.by_feature(index, 300)
    ends = [0, *(stop for _, stop in entries.cuts)]
    assert [start for start, _ in entries.cuts] == ends[:-1]
    assert ends[-1] == 300
    edges = np.array(entries.edges)
    assert max(edges[b] - edges[a] for a, b in entries.cuts) <= sparse_sums.ENTRIES
    assert len(entries.cuts) < 300 / 8
