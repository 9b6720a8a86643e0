"""What the data side of training costs: tokens, index and references of many pairs, no model.

    python scripts/bench/data_side.py --pairs 60000 --features 2000

Writes a reference cache of random rows below a temporary folder (some 17 kB per row at 2,000
features), and prints in a fresh process: seconds to open it and until the first batch, seconds per
row over one epoch in training order, and resident memory before and at the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from resident import own_peak_bytes

from fpo_mlx import cache
from fpo_mlx.data import batches, mirrored, pair_lengths
from fpo_mlx.pipeline import CachedScores
from fpo_mlx.records import PairScore, ResponseScore, SparseFeatures, TokenPair

IDENTITY = cache.CacheIdentity(model="m" * 64, tokenizer="t" * 64, saes=(("s" * 64, "site"),))


def make_pairs(count: int, tokens: int = 150, seed: int = 0) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(tokens // 2, tokens * 3 // 2, size=(count, 3))
    return [
        TokenPair(*(rng.integers(0, 49152, n, dtype=np.int32) for n in row), index=i, where=f"{i}")
        for i, row in enumerate(sizes)
    ]


def write_cache(folder: Path, pairs: Sequence[TokenPair], features: int) -> None:
    rng = np.random.default_rng(1)
    indices = np.sort(rng.choice(4 * features, features, replace=False)).astype(np.int32)

    def score(group: Sequence[TokenPair]) -> list[PairScore]:
        values = rng.random((len(group), 2, features), dtype=np.float32)
        return [
            tuple(
                ResponseScore(-1.0, len(y), (SparseFeatures(indices, values[i, side]),))
                for side, y in enumerate(pair.responses)
            )  # type: ignore[misc]
            for i, pair in enumerate(group)
        ]

    cache.fill(cache.open_cache(folder, IDENTITY, create=True), pairs, score)


def measure(folder: Path, pairs: Sequence[TokenPair], most: int) -> dict[str, float]:
    """Of this process. most: pairs of the epoch that are read."""
    before, began = resident(), time.perf_counter()
    refs = CachedScores(cache.open_cache(folder, IDENTITY), pairs)
    opened = time.perf_counter() - began
    first, read = 0.0, 0
    order = batches(pair_lengths(pairs), 4, 0, twins=mirrored(pairs))
    began = time.perf_counter()
    while read < most:
        for i in next(order):
            sum(float(side.features[0].values[0]) for side in refs[int(i)])
            read += 1
        first = first or time.perf_counter() - began
    each = (time.perf_counter() - began) / (2 * read)
    return {
        "open s": opened, "first batch s": first, "us per row": 1e6 * each,
        "MB before": before, "MB now": resident(), "MB peak": peak(),
    }  # fmt: skip


def resident() -> float:
    """Megabytes now; on a Mac, which does not say, the peak."""
    return _status("VmRSS") or peak()


def peak() -> float:
    """Megabytes."""
    return _status("VmHWM") or own_peak_bytes() / 1e6


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=2000, help="Non-zeros per row.")
    parser.add_argument("--read", type=int, help="Pairs that are read. [default: all]")
    parser.add_argument("--cache", type=Path, help="Where the cache is, or is to be, and stays.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pairs = make_pairs(args.pairs)
    if args.child:
        found = measure(args.cache, pairs, args.read or len(pairs))
        sys.stdout.write(json.dumps({k: round(v, 3) for k, v in found.items()}) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        write_cache(folder, pairs, args.features)  # what is there already stays
        again = [*sys.argv, "--child", "--cache", str(folder)]
        subprocess.run([sys.executable, *again], check=True)


if __name__ == "__main__":
    main()
