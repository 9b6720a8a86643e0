"""Where runs start: tiny models of every kind down the GPU's branches, on a CPU.

    python scripts/checks/start.py

Prints |u| / beta per token without and with gradient, relative D, and the first training loss
beside its closed form. Exits with 1 where a bound of tests/support/gpu_path.py does not hold.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

from gpu_path import CASES, RECORD, open_case, start_of

from fpo_mlx.machine import device


def main() -> int:
    held = True
    print(f"{'case':58} {'|u|/beta':>9} {'trained':>9} {'D':>9} {'loss':>9} {'wanted':>9}")
    with tempfile.TemporaryDirectory() as root, device.using(RECORD):
        for case in CASES:
            start = start_of(open_case(Path(root), case))
            held &= start.holds(case.dtype)
            print(
                f"{case!s:58} {start.gap:9.1e} {start.trained_gap:9.1e} {start.distance:9.1e} "
                f"{start.loss:9.5f} {start.want:9.5f}{'' if start.holds(case.dtype) else '  OUT'}"
            )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
