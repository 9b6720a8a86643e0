"""Freed buffers and active memory over many updates of random lengths, down the GPU's branches.

    python scripts/checks/buffers.py [--updates 500] [--limit-mb 1]

Prints the most that MLX kept of freed buffers and by how much active memory grew, for what
`precompute`, `evaluate` (with its KL) and `train` do with each pair; all run on the same pairs of
random lengths. Exits with 1 where the limit was passed or memory grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

import mlx.core as mx
import numpy as np
from gpu_path import RECORD, Case, model_folder, open_case
from helpers import random_pairs, random_sae

from fpo_mlx import cache
from fpo_mlx.judge.evaluate import evaluate
from fpo_mlx.machine import device
from fpo_mlx.records import PairScore, Site, TokenPair
from fpo_mlx.reference.mlx_backend import MlxBackend
from fpo_mlx.train.metrics import ScoredPairs

CASE = Case("llama", "plain", "float32")


@dataclass(frozen=True)
class Seen:
    cached: int  # bytes, the most at the end of a step
    growth: float  # of active memory, last tenth of the steps over the first


def watch(root: Path, updates: int, limit: int) -> dict[str, Seen]:
    """By command; every step is a pair of other lengths."""
    rng = np.random.default_rng(0)
    sizes = [tuple(int(n) for n in rng.integers(2, 60, 3)) for _ in range(updates)]
    pairs, refs = random_pairs(sizes, seed=1), []
    before = mx.set_cache_limit(limit)
    try:
        with device.using(replace(RECORD, cache_limit=limit)):
            precompute = _watched(lambda: refs.extend(_precompute(root, pairs)))
            trainer = open_case(root, CASE)
            trainer.train = ScoredPairs(pairs, refs)
            trainer.scorer.measure_kl = True
            judged = _watched(lambda: evaluate(trainer.scorer, trainer.train))
            trainer.scorer.measure_kl = False
            trained = _follow(_update(trainer, i) for i in range(updates))
        return {"precompute": precompute, "evaluate": judged, "train": trained}
    finally:
        mx.set_cache_limit(before)


def _precompute(root: Path, pairs: list[TokenPair]) -> list[PairScore]:
    """Into a cache on the disk, by shards, and out of it again."""
    saes = [random_sae("topk", 32, Site(1))]
    engine = MlxBackend(model_folder(root, CASE), saes=saes)
    identity = cache.CacheIdentity("m", "t", saes=((saes[0].fingerprint(), str(saes[0].site)),))
    store = cache.open_cache(root / "reference", identity, create=True)
    cache.fill(store, pairs, engine.score)
    return [(store.get(pair.keys[0]), store.get(pair.keys[1])) for pair in pairs]


def _update(trainer, number: int) -> None:
    _, gradient = trainer._gradient(np.array([number]))
    trainer._apply(gradient, mx.array(1.0))


def _watched(run: Callable[[], object]) -> Seen:
    """Looks where the code itself tidies up: after every pair."""
    seen, tidy = [], device.tidy

    def look() -> None:
        tidy()
        seen.append((mx.get_cache_memory(), mx.get_active_memory()))

    with patch.object(device, "tidy", look):
        run()
    return _seen(seen)


def _follow(steps: Iterable[object]) -> Seen:
    return _seen([(mx.get_cache_memory(), mx.get_active_memory()) for _ in steps])


def _seen(figures: list[tuple[int, int]]) -> Seen:
    cached, active = zip(*figures, strict=True)
    tenth = max(1, len(active) // 10)
    first = max(active[tenth : 2 * tenth])  # the optimizer's state is there by then
    return Seen(max(cached), max(active[-tenth:]) / first - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--limit-mb", type=float, default=1.0)
    given = parser.parse_args()
    limit = int(given.limit_mb * 2**20)
    with tempfile.TemporaryDirectory() as root:
        found = watch(Path(root), given.updates, limit)
    for name, seen in found.items():
        print(f"{name:10} cached at most {seen.cached / 2**20:.3f} MiB, grew {seen.growth:.2%}")
    held = all(seen.cached <= limit and seen.growth <= 0.02 for seen in found.values())
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
