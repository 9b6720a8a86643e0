"""Where runs start: tiny models of every kind down the GPU's branches, on a CPU.

    python scripts/checks/start.py [--full] [--only gemma2-affine]

--full: every kind of model, weights, dtype, adapter and micro batch under every preset, some 1,000
starts; --only: cases in whose name this regular expression is found.

Prints |u| / beta per token without and with gradient, relative D, and the first training loss
beside its closed form. Exits with 1 where a bound of tests/support/gpu_path.py does not hold.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

from gpu_path import CASES, FULL, RECORD, Case, Start, open_case, start_of, start_with

from fpo_mlx.config import PRESETS
from fpo_mlx.machine import device


def starts(root: Path, full: bool, only: str) -> Iterator[tuple[Case, Start]]:
    """The cases and what was seen of each."""
    for case in FULL if full else CASES:
        if not re.search(only, str(case)):
            continue
        trainer = open_case(root, case)
        if not full:
            yield case, start_of(trainer)
            continue
        for preset in PRESETS:
            yield replace(case, preset=preset), start_with(trainer, preset)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="")
    given, out, seen = parser.parse_args(), 0, 0
    print(f"{'case':58} {'|u|/beta':>9} {'trained':>9} {'D':>9} {'loss':>9} {'wanted':>9}")
    with tempfile.TemporaryDirectory() as root, device.using(RECORD):
        for case, start in starts(Path(root), given.full, given.only):
            holds, seen = start.holds(case.dtype), seen + 1
            out += not holds
            print(
                f"{case!s:58} {start.gap:9.1e} {start.trained_gap:9.1e} {start.distance:9.1e} "
                f"{start.loss:9.5f} {start.want:9.5f}{'' if holds else '  OUT'}",
                flush=True,
            )
    print(f"{seen} starts, {out} out of bounds")
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
