"""Does --target-drift hold what it names? One short training per cell, judged on held-out pairs.

    python scripts/studies/drift_targets.py --data PAIRS --sae jumprelu=SAE1 --sae topk=SAE2
    python scripts/studies/drift_targets.py --list           # what there is, and what is kept

A cell is an SAE, a target, a learning rate, a batch size and a seed. Each is one `fpo-mlx train`
whose last validation gives the drift r of the rejected held-out answers: the root of the mean of
their relative D. Cells that are kept in the results are not run again, so a stopped study goes on.
The figures are in scripts/studies/results/drift_targets.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from texts import ROOT, rows, shared, write_rows

from fpo_mlx.demo import smollm2
from fpo_mlx.storage import files

RESULTS = ROOT / "scripts" / "studies" / "results"
PAIRS = {1: 80, 4: 160, 16: 320}  # pairs trained on, by batch size


@dataclass(frozen=True)
class Cell:
    sae: str
    target: float
    learning_rate: float
    batch_size: int
    seed: int

    @property
    def id(self) -> str:
        rate = f"{self.learning_rate:.0e}"
        return f"{self.sae}-r{self.target:g}-lr{rate}-b{self.batch_size}-s{self.seed}"


def cells(saes: Sequence[str], seeds: int) -> Iterator[Cell]:
    """The most telling first: targets at the usual rate, then rates and batches, then seeds."""
    first = saes[0]
    some = [Cell(first, target, 2e-5, 1, 0) for target in (0.1, 0.2, 0.05, 0.3)]
    some += [Cell(sae, 0.1, 2e-5, 1, 0) for sae in saes[1:]]
    some += [Cell(first, 0.1, rate, 1, 0) for rate in (5e-5, 1e-5, 1e-4)]
    some += [Cell(first, 0.1, 2e-5, size, 0) for size in (4, 16)]
    product = itertools.product(range(seeds), saes, (0.05, 0.1, 0.2, 0.3), (1e-5, 2e-5, 1e-4))
    some += [Cell(sae, target, rate, 1, seed) for seed, sae, target, rate in product]
    yield from dict.fromkeys(some)


def main() -> int:
    options = parse()
    saes = dict(one.split("=", 1) for one in options.sae) or own_saes()
    path = RESULTS / "drift_targets.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    todo = [cell for cell in cells(list(saes), options.seeds) if cell.id not in kept]
    if options.list:
        print(*(f"{'kept' if c.id in kept else 'open'}  {c.id}" for c in cells(list(saes), 3)))
        return 0
    model = options.model or smollm2.fetch(say=print).full
    data = write_data(options.data, options.work)
    started = time.monotonic()
    for cell in todo:
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            break
        kept[cell.id] = asdict(cell) | run(cell, model, saes[cell.sae], data, options.work)
        print(cell.id, json.dumps(kept[cell.id]["held_out"]), flush=True)
        files.write_json(path, kept)
        files.write_text(path.with_suffix(".md"), markdown(kept))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=shared("data"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sae", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--work", type=Path, default=ROOT / ".drift-targets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def own_saes() -> dict[str, str]:
    return {p.name.rsplit("-", 1)[-1]: str(p) for p in sorted(shared("sae").glob("smollm2-*"))}


def write_data(source: Path, work: Path) -> Path:
    """Pairs of some 190 tokens at most, so that a cell takes minutes."""
    for name, count in (("train", 192), ("valid", 40)):
        short = [row for row in rows(source / f"{name}.jsonl") if size(row) < 700]
        write_rows(work / "data" / f"{name}.jsonl", short[:count])
    return work / "data"


def size(row: Mapping[str, Any]) -> int:
    sides = (json.dumps(row["chosen"]), json.dumps(row["rejected"]))
    return len(json.dumps(row["prompt"])) + max(map(len, sides))


def run(cell: Cell, model: Path, sae: str, data: Path, work: Path) -> dict[str, Any]:
    """Train, and read the last validation and the reports of the second half."""
    out = work / cell.id
    words = {
        "model": model, "sae": sae, "data": data, "adapter-path": out, "max-seq-length": 192,
        "target-drift": cell.target, "learning-rate": cell.learning_rate, "seed": cell.seed,
        "batch-size": cell.batch_size, "iters": PAIRS[cell.batch_size] // cell.batch_size,
        "steps-per-report": 5, "steps-per-eval": 10_000, "val-batches": -1, "save-every": 10_000,
    }  # fmt: skip
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    begun = time.monotonic()
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fpo_mlx", "train", *flags, "--no-check-sae"],
        env={**os.environ, **one, "FPO_MLX_CACHE": str(work / "cache")},
        capture_output=True,
        text=True,
    )
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "exit_code": done.returncode,  # 4: the guard stopped it
        "held_out": held_out(log),
        "alphas": [entry["alpha"] for entry in log if entry["kind"] == "train"],
        "seconds": time.monotonic() - begun,
    }


def held_out(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    metrics = [entry for entry in log if entry["kind"] == "valid"][-1]["metrics"]
    return {
        "drift": metrics["drift/rejected"] ** 0.5,
        "drift_chosen": metrics["drift/chosen"] ** 0.5,
        "margin": metrics["rewards/margins"] / 0.1,  # nats per token: beta is 0.1
        "accuracy": metrics["rewards/accuracies"],
        "chosen_change": metrics["logps_per_token/chosen_change"],
    }


def markdown(kept: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# Does --target-drift hold what it names?", "",
        "Written by `scripts/studies/drift_targets.py`; do not edit. SmolLM2-135M in float32, SAEs "
        "after block 27, 40 held-out pairs.", "",
        "| SAE | target | learning rate | batch | seed | held-out drift | over target | margin | "
        "accuracy | chosen, nats per token | alpha at the end | exit code |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for c in kept.values():
        h = c["held_out"]
        lines.append(
            f"| {c['sae']} | {c['target']:g} | {c['learning_rate']:.0e} | {c['batch_size']} | "
            f"{c['seed']} | {h['drift']:.3f} | {h['drift'] / c['target']:.2f} | "
            f"{h['margin']:.3f} | {h['accuracy']:.2f} | {h['chosen_change']:+.3f} | "
            f"{c['alphas'][-1]:.3g} | {c['exit_code']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
