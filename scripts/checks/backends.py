"""Both backends over the same real pairs: how far their caches, and runs from them, are apart.

    python scripts/checks/backends.py --model FOLDER [--model FOLDER …] --sae SAE --data DATA

A folder `shared` beside the checkout, with `sae` and `data` in it, is the default where it exists.
For each model it prints the largest relative difference of log-probs, of pooled features relative
to the largest of their response, whether the keys are the same, and the first training losses from
either cache. It ends with 1 when a difference is over --tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpo_mlx import cache, pipeline
from fpo_mlx.config import load_config
from fpo_mlx.demo.smollm2 import model_folders
from fpo_mlx.sae import load_sae

SHARED = Path(__file__).resolve().parents[3] / "shared"
SAE = SHARED / "sae" / "smollm2-135m-instruct-l27-4k-jumprelu"  # TopK has true ties


def some_rows(data: Path, count: int, shortest: bool, folder: Path) -> Path:
    """A file of `count` rows of the training split: the first, or the shortest."""
    path = data / "train.jsonl" if data.is_dir() else data
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if shortest:
        rows.sort(key=lambda row: len(json.dumps(row)))
    chosen = folder / "train.jsonl"
    chosen.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    return chosen


@dataclass
class Gaps:
    """Largest differences of two caches' rows; a step is a JumpReLU that fired in one of them."""

    rows: int = 0
    logp: float = 0.0  # relative
    features: float = 0.0  # of the largest of their response, steps left out
    steps: int = 0
    nonzeros: int = 0


def compare(a: Path, b: Path, threshold: np.ndarray | None) -> tuple[bool, Gaps]:
    """Whether the keys are the same, and the gaps. threshold: [F] of a JumpReLU SAE.

    JumpReLU is not continuous: where a token's pre-activation lies at the threshold to rounding,
    the mean over |y| tokens moves by threshold / |y|, whoever computes it.
    """
    one, two = (cache.open_cache(path, cache.read_identity(path)) for path in (a, b))
    gaps = Gaps()
    for key in one.keys():  # noqa: SIM118 (a list)
        if key not in two:
            continue
        x, y = one.get(key), two.get(key)
        gaps.rows += 1
        gaps.logp = max(gaps.logp, abs(x.logps - y.logps) / abs(x.logps))
        size = 1 + max(int(f.indices.max(initial=0)) for f in (x.features[0], y.features[0]))
        p, q = (f.features[0].to_dense(size).astype(np.float64) for f in (x, y))
        apart, largest = np.abs(p - q), np.abs(p).max()
        if threshold is not None:
            step = threshold[:size] / x.tokens
            whole = (apart > 0.5 * step) & (np.abs(apart / step - np.round(apart / step)) < 1e-3)
            gaps.steps += int(whole.sum())
            apart = np.where(whole, 0.0, apart)
        gaps.nonzeros += int((p != 0).sum())
        gaps.features = max(gaps.features, float(apart.max() / largest))
    return set(one.keys()) == set(two.keys()), gaps


def losses(settings: dict, reference: Path, out: Path) -> np.ndarray:
    """Training losses of the first updates of one pair each, from this cache."""
    own = {"reference": str(reference), "adapter_path": str(out), "batch_size": 1}
    config = load_config(settings | own | {"steps_per_report": 1, "learning_rate": 2e-5})
    reports = pipeline.train(config, say=lambda _: None)
    return np.array([r.loss for r in reports if type(r).__name__ == "StepReport"])


def check(model: Path, args: argparse.Namespace, rows: Path, work: Path) -> bool:
    settings = {
        "model": str(model), "sae": (str(args.sae),), "data": str(rows),
        "max_seq_length": args.max_seq_length, "iters": args.iters,
    }  # fmt: skip
    places = {name: work / f"{model.name}-{name}" for name in ("mlx", "torch")}
    for backend, place in places.items():
        start = time.perf_counter()
        done = pipeline.precompute(
            load_config(settings), output=place, backend=backend, device="cpu", split="train",
            say=lambda text: print(f"  {text}", flush=True),
        )  # fmt: skip
        print(f"  {backend}: {done.pairs} pairs in {time.perf_counter() - start:.0f} s", flush=True)
    same, gaps = compare(*places.values(), load_sae(args.sae, decoder=False).threshold)
    print(f"{model.name}: {gaps.rows} rows, keys identical: {same}")
    print(f"  log-probs differ by up to {gaps.logp:.2e} (relative)")
    print(f"  pooled features by up to {gaps.features:.2e} of their response's largest", end="")
    print(f", but for {gaps.steps} of {gaps.nonzeros} at a threshold", flush=True)
    runs = [losses(settings, place, work / f"{place.name}-out") for place in places.values()]
    gap = float(np.abs(runs[0] - runs[1]).max())
    for name, run in zip(places, runs, strict=True):
        print(f"  losses from {name}: {' '.join(f'{loss:.6f}' for loss in run)}")
    print(f"  losses differ by up to {gap:.2e}", flush=True)
    rare = gaps.steps <= max(1, gaps.nonzeros // 10_000)
    return same and rare and max(gaps.logp, gaps.features, gap) <= args.tolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", help="default: SmolLM2, both forms")
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--shortest", action="store_true", help="the shortest pairs: less time")
    parser.add_argument("--max-seq-length", type=int, default=320)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    models = args.model or [model_folders().full, model_folders().quantized]
    with tempfile.TemporaryDirectory() as folder:
        rows = some_rows(args.data, args.pairs, args.shortest, Path(folder))
        good = [check(model, args, rows, Path(folder)) for model in models]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
