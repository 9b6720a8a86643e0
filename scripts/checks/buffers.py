"""Freed buffers and active memory over many updates of random lengths, down the GPU's branches.

    python scripts/checks/buffers.py [--updates 500] [--limit-mb 1]

Prints the most that MLX kept of freed buffers and by how much active memory grew, for training,
measuring (as `evaluate` does) and the reference pass. Exits with 1 where the limit was passed or
memory grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

import mlx.core as mx
import numpy as np
from gpu_path import RECORD, Case, open_case
from helpers import random_pairs

from fpo_mlx.machine import device
from fpo_mlx.train.metrics import ScoredPairs, measure


@dataclass(frozen=True)
class Seen:
    cached: int  # bytes, the most at the end of a step
    growth: float  # of active memory, last tenth of the steps over the first


def watch(root: Path, updates: int, limit: int) -> dict[str, Seen]:
    """Training, measuring and the reference pass, one pair of other lengths each time."""
    rng = np.random.default_rng(0)
    sizes = [tuple(int(n) for n in rng.integers(2, 60, 3)) for _ in range(updates)]
    before = mx.set_cache_limit(limit)
    try:
        with device.using(replace(RECORD, cache_limit=limit)):
            trainer = open_case(root, Case("llama", "plain", "float32"))
            pairs = random_pairs(sizes, seed=1)
            refs = []
            reference = _follow(
                refs.extend(trainer.scorer.reader.scores([pair])) or device.tidy() for pair in pairs
            )
            trainer.train = ScoredPairs(pairs, refs)
            return {
                "reference": reference,
                "measure": _follow(
                    measure(trainer.scorer, trainer.train, positions=[i]) for i in range(updates)
                ),
                "train": _follow(_update(trainer, i) for i in range(updates)),
            }
    finally:
        mx.set_cache_limit(before)


def _update(trainer, number: int) -> None:
    _, gradient = trainer._gradient(np.array([number]))
    trainer._apply(gradient, mx.array(1.0))


def _follow(steps: Iterable[object]) -> Seen:
    cached, active = [], []
    for _ in steps:
        cached.append(mx.get_cache_memory())
        active.append(mx.get_active_memory())
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
