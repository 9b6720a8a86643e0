"""Pairs, scores that depend on their tokens alone, and caches filled with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fpo_mlx import cache as rc
from fpo_mlx.records import ResponseScore, SparseFeatures, TokenPair, row_key

IDENTITY = rc.CacheIdentity(
    model="m" * 64,
    tokenizer="t" * 64,
    saes=(("s" * 64, "resid_post of block 1"),),
)


def make_pair(index: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenPair:
    arrays = [np.array(ids, np.int32) for ids in (prompt, chosen, rejected)]
    return TokenPair(*arrays, index=index, where=f"train.jsonl:{index + 1}")


def make_pairs(n: int, seed: int = 0) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, size=(n, 3))
    return [
        make_pair(i, *(rng.integers(0, 99, k).tolist() for k in s)) for i, s in enumerate(sizes)
    ]


def fake_score(prompt: np.ndarray, response: np.ndarray) -> ResponseScore:
    """A score that depends on the token ids and nothing else."""
    rng = np.random.default_rng(int.from_bytes(row_key(prompt, response)[:8], "little"))
    dense = np.maximum(rng.normal(size=12), 0).astype(np.float32)
    return ResponseScore(-rng.exponential(), len(response), (SparseFeatures.from_dense(dense),))


class Scorer:
    """Counts what it was asked; raises instead of scoring group number `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.groups: list[list[TokenPair]] = []
        self.fail_at = fail_at

    def __call__(self, pairs):
        if len(self.groups) == self.fail_at:
            raise KeyboardInterrupt
        self.groups.append(list(pairs))
        return [tuple(fake_score(p.prompt, r) for r in p.responses) for p in pairs]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def filled(folder: Path, pairs, identity=IDENTITY, made=None, **options) -> rc.ReferenceCache:
    cache = rc.open_cache(folder, identity, create=True, made=made)
    rc.fill(cache, pairs, Scorer(), **options)
    return cache


def shared_rows() -> list[TokenPair]:
    """Pairs of one prompt that share responses, one of them made of rows of earlier pairs."""
    a, b, c, d = [1, 2], [3, 4], [5, 6], [7, 8]
    both = [(a, b), (c, d), (a, c), (b, a), (a, d), ([9, 9, 9], a), (b, [8, 8, 8, 8])]
    return [make_pair(i, [0, 1], *sides) for i, sides in enumerate(both)]
