"""Predicted against measured peak memory: one real step per case, each in a process of its own.

    python scripts/bench/plan.py [MODEL] [--cases main-256,sae] [--json FILE]

A case holds where predicted / measured lies within 15 % of 1. Both are whole peaks, weights
included; what lies above the weights is shown beside them, because that is what the constants at
the head of fpo_mlx/machine/memory.py describe. To calibrate them anew: change core or the model's
forward, run this, and move KEPT and SCORES until the cases without checkpointing agree,
WORK_AGAIN for those with it, the `ahead` of machine/device.py, TILE_ARRAYS and FEATURE_VECTORS for
wide SAEs, KL_TILES for tdpo2, and FORWARD for precompute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_mlx.config import load_config
from fpo_mlx.demo import smollm2
from fpo_mlx.machine import memory
from fpo_mlx.storage import files
from fpo_mlx.storage.hub import read_config

WITHIN = 0.15
SHAPES = {"main-256": (256, 90, 70), "main-76": (76, 154, 77), "main-512": (512, 256, 256)}
LAYERS, RANK = 16, 8


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name: as `scripts/bench/plan_measure.py` takes them."""
    base = {
        "command": "train", "grad_checkpoint": False, "micro": 1, "objective": "fpo", "sae": 4096,
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, shape in SHAPES.items():
        for again in (False, True):
            for micro in (1, 2):
                label = f"{name}{' checkpoint' if again else ''} x{micro}"
                changes = {"grad_checkpoint": again, "micro": micro, "shape": shape}
                found[label] = {**base, **changes}
        wide = {"command": "precompute", "shape": shape, "sae": 16384}
        found[f"{name} precompute"] = {**base, **wide}
    for width in (16384, 65536):
        found[f"main-256 sae {width}"] = {**base, "shape": SHAPES["main-256"], "sae": width}
    found["main-76 tdpo2"] = {**base, "shape": SHAPES["main-76"], "objective": "tdpo2"}
    return found


def predict(model: Path, case: Mapping[str, Any]) -> float:
    """Bytes, by the same functions that `fpo-mlx plan` uses."""
    from fpo_mlx.cache import CacheIdentity
    from fpo_mlx.pipeline.job import Job
    from fpo_mlx.pipeline.plan import case_of

    config = load_config(
        {
            "model": str(model), "objective": case["objective"], "num_layers": LAYERS,
            "micro_batch_size": case["micro"], "batch_size": case["micro"],
            "grad_checkpoint": case["grad_checkpoint"], "lora_parameters": {"rank": RANK},
        }
    )  # fmt: skip
    none: Any = None  # nothing here is tokenised
    job = Job(config, model, none, (), CacheIdentity("plan", "plan"))
    found = case_of(job, [memory.Lengths(*case["shape"])])
    # what bench_subjects.random_sae makes: a bias and a threshold beside the matrix
    width = int(read_config(model)["hidden_size"])
    saes = (memory.SaeShape(case["sae"], width),) if case["objective"] == "fpo" else ()
    lengths = found.lengths[0]
    if case["command"] == "precompute":
        return memory.total(memory.precompute_terms(found.model, saes, found.tiles, lengths))
    return memory.total(memory.train_terms(found.model, saes, found.setup, found.tiles, lengths))


def measured(model: Path, case: Mapping[str, Any], steps: int) -> dict[str, float]:
    script = Path(__file__).with_name("plan_measure.py")
    command = [sys.executable, str(script), str(model), json.dumps(case), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predicted against measured peak memory.")
    parser.add_argument("model", type=Path, nargs="?", help="default: SmolLM2 of the demo")
    parser.add_argument("--cases", default="", help="only cases whose name holds one of these")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    model = given.model or smollm2.fetch(say=lambda text: print(text, file=sys.stderr)).full
    wanted = [part for part in given.cases.split(",") if part]
    rows, bad = [], 0
    print("| case | predicted MB | measured MB | ratio | above the weights | held |")
    print("|---|---|---|---|---|---|")
    for name, case in cases().items():
        if wanted and not any(part in name for part in wanted):
            continue
        guess, seen = predict(model, case), measured(model, case, given.steps)
        ratio, above = guess / seen["peak"], seen["peak"] - seen["resident"]
        held = abs(ratio - 1) <= WITHIN
        bad += not held
        rows.append({"case": name, "predicted": guess, **seen, "ratio": ratio, "held": held})
        part = (guess - seen["resident"]) / 1e6
        print(
            f"| {name} | {guess / 1e6:.0f} | {seen['peak'] / 1e6:.0f} | {ratio:.3f} | "
            f"{part:.0f} / {above / 1e6:.0f} | {'yes' if held else 'NO'} |",
            flush=True,
        )
    if given.json:
        files.write_json(given.json, rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
