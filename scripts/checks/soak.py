"""Trains a tiny model for 2,000 updates and sees that nothing grows: memory, open files.

    python scripts/checks/soak.py
    python scripts/checks/soak.py --updates 300 --every 50 --bound 10

The real Trainer on random pairs, with validation, numbered checkpoints and reports. Sampled after
every few updates: resident memory of the process, MLX's active, cached and peak memory, open file
descriptors. The first quarter is warm-up. Exits 1 when the last quarter's mean of resident memory
or of MLX's active memory, or MLX's peak, lies more than the bound above the second quarter's, or
when there are more open files.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


@dataclass(frozen=True)
class Sample:
    """Megabytes, but for the last two."""

    resident: float
    active: float
    cached: float
    peak: float
    files: int
    seconds: float


def resident_mb() -> float:
    """Of this process, now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:  # macOS
        told = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
        )
        return int(told.stdout) * 1024 / 1e6


def sample(started: float) -> Sample:
    import mlx.core as mx

    gc.collect()
    return Sample(
        resident=resident_mb(),
        active=mx.get_active_memory() / 1e6,
        cached=mx.get_cache_memory() / 1e6,
        peak=mx.get_peak_memory() / 1e6,
        files=len(os.listdir("/dev/fd")),
        seconds=time.perf_counter() - started,
    )


def soak(folder: Path, updates: int, every: int) -> list[Sample]:
    """Train, a sample each `every` updates."""
    from fpo_mlx import machine

    machine.set_up()
    import tiny_models
    from helpers import SIZES, open_trainer, random_pairs

    from fpo_mlx.train.events import StepReport

    model = tiny_models.tiny_llama(folder / "model", num_hidden_layers=2)
    pairs = random_pairs(SIZES)
    trainer = open_trainer(
        model, folder / "out", pairs, valid=pairs[:2], iters=updates, batch_size=2,
        learning_rate=1e-4, steps_per_report=every, steps_per_eval=4 * every,
        save_every=4 * every, max_margin=1e9, max_logp_drop=1e9,
    )  # fmt: skip
    started, samples = time.perf_counter(), []
    for report in trainer.run():
        if isinstance(report, StepReport):
            samples.append(sample(started))
            shown = "  ".join(
                f"{field.name} {value:.1f}"
                for field, value in zip(fields(Sample), astuple(samples[-1]), strict=True)
            )
            print(f"{report.iteration:>6}  {shown}", flush=True)
    return samples


def judge(samples: list[Sample], bound: float) -> list[str]:
    """What grew past the bound (percent) between the second and the last quarter."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    faults = []
    for name in ("resident", "active", "peak"):
        before, after = (sum(getattr(s, name) for s in part) / len(part) for part in (early, late))
        growth = 100 * (after / before - 1)
        print(f"{name:<9} {before:8.1f} MB -> {after:8.1f} MB  {growth:+.2f} %")
        if growth > bound:
            faults.append(f"{name} memory grew by {growth:.2f} %, over {bound:g} %")
    most = max(s.files for s in early), max(s.files for s in late)
    print(f"{'files':<9} {most[0]:>8} -> {most[1]:>8}")
    if most[1] > most[0]:
        faults.append(f"open files went from {most[0]} to {most[1]}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--bound", type=float, default=2.0, help="percent of growth")
    chosen = parser.parse_args()
    if chosen.updates // chosen.every < 4:
        parser.error("wanted at least four samples")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        samples = soak(Path(folder), chosen.updates, chosen.every)
    faults = judge(samples, chosen.bound)
    print(f"{chosen.updates} updates in {samples[-1].seconds:.0f} s")
    for fault in faults:
        print(f"FAULT {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
