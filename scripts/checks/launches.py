"""How many operations a GPU would launch, counted in the graph, at Gemma-2-2b's shape.

    python scripts/checks/launches.py

A part of `fpo-mlx doctor --device-check`, by itself. Exits with 1 above the bounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

from fpo_mlx.pipeline.device_check import launches


def main() -> int:
    held = True
    for line in launches.lines():
        held &= line.verdict != "WRONG"
        print(f"{line.name:42} {line.text}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
