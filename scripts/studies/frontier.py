"""What does each method's reward cost? True reward against drift, along parts of every change.

    python scripts/studies/frontier.py --model M --sae S            everything; again to go on, and
        for the rates that turned out the better ones
    python scripts/studies/frontier.py --model M --sae S --minutes 60   begin nothing later
    python scripts/studies/frontier.py … --method dpo       only its cells; once the pairs are made
        a run for each core may share the work folder
    python scripts/studies/frontier.py --list                       what is there, what is left

In the manner of DPO's sentiment experiment (arXiv 2305.18290, section 6.1): the base answers 400
prompts of the project's own four times; a reward that is known (VADER's sentiment, or how plain an
answer is) picks the best and the worst of each; every method trains on these pairs. Parts of an
adapter's change are measured on 128 held-out prompts with two sampled answers each (three seeds
make 768 answers a point): reward, KL from the base on these answers, what changed on prompts about
other things.

Everything lies in --work; results/frontier-REWARD.json and .md are written anew after each cell,
and cells that are in them are not run again, on any machine.
Needs `pip install vaderSentiment textstat`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frontier_rewards as known
import frontier_show
from texts import ROOT, as_adapter, in_time, say, shared

from fpo_mlx import machine
from fpo_mlx.storage import files

RESULTS = ROOT / "scripts" / "studies" / "results"
UPDATES = 24  # of BATCH pairs
BATCH = 8  # of 2, a drift of .2 was used up by the steps' own noise: margins stayed at nothing
_DPO = ("--objective", "dpo")
METHODS = {  # the rival, ours held more and less, then the others
    "dpo": _DPO,
    "fpo free": ("--alpha", "0"),
    "fpo drift .8": ("--target-drift", "0.8"),
    "fpo drift .4": ("--target-drift", "0.4"),
    "simpo": ("--objective", "simpo"),
    "tdpo2": ("--objective", "tdpo2"),
    "simpo-kl": ("--objective", "simpo-kl"),
    "fpo": (),
    "fpo activations": ("--constraint", "activations"),
    "dpo + nll": (*_DPO, "--nll-weight", "1"),
    "dpo drift .4": (*_DPO, "--constraint", "features", "--target-drift", "0.4"),
}
FIRST = tuple(METHODS)[:4]  # on all seeds before anything else
# parts of the change that are measured, until one is beyond what is compared
PARTS = {"fpo free": (0.1, 0.25, 0.5, 1.0)}
USUAL_PARTS = (0.25, 0.5, 1.0)
RATES = (1e-4, 5e-5, 2e-4)  # the first on all seeds, the others on the first: the tuning budget


@dataclass(frozen=True)
class Cell:
    method: str
    rate: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.method.replace(' ', '-')}-lr{self.rate:.0e}-s{self.seed}"


def cells(seeds: int, only: Sequence[str], found: Mapping[str, Any]) -> Iterator[Cell]:
    """The most telling first; then every method, its rates, and a better rate on all seeds.

    found: the results so far.
    """
    usual = [Cell(m, RATES[0], s) for of in (FIRST, METHODS) for s in range(seeds) for m in of]
    tuning = [Cell(m, rate, 0) for m in METHODS for rate in RATES]
    best = frontier_show.better_rates(found, RATES)
    better = [Cell(m, rate, s) for m, rate in best.items() for s in range(seeds)]
    every = dict.fromkeys([*usual, *tuning, *better])
    yield from (cell for cell in every if not only or cell.method in only)


def main() -> int:
    o = parse()
    machine.set_up()
    work = o.work / o.reward
    found = kept(RESULTS / f"frontier-{o.reward}.json")
    plan = list(cells(o.seeds, o.method, found))
    there = {cell_of(run) for run in found["runs"]}
    todo = [c for c in plan if c not in there and not points_of(c, work).is_file()]
    if o.list:
        print(*(f"{'open' if c in todo else 'kept'}  {c.id}" for c in plan), sep="\n")
        return 0
    restore(work, found)
    affordable = in_time(o.minutes, todo)  # the making of the pairs counts
    data = make_pairs(o, work)
    meter = None
    for cell in affordable:
        meter = meter or open_meter(o, work)
        began = time.monotonic()
        measure(cell, meter, train(cell, o, data, work), work)
        say(f"{cell.id}: {time.monotonic() - began:.0f} s")
        frontier_show.write(work, RESULTS / f"frontier-{o.reward}")
    frontier_show.write(work, RESULTS / f"frontier-{o.reward}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    saes = sorted(shared("sae").glob("smollm2-*jumprelu"))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--sae", type=Path, default=saes[0] if saes else None, help="its SAE")
    parser.add_argument("--reward", choices=list(known.REWARDS), default="sentiment")
    parser.add_argument("--work", type=Path, default=ROOT / ".frontier", help="all that is made")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", action="append", choices=list(METHODS), default=[])
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def kept(results: Path) -> dict[str, Any]:
    """What the results hold: base and runs; no run where nothing was measured yet."""
    return json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"runs": []}


def restore(work: Path, found: Mapping[str, Any]) -> None:
    """Cells of the results that the work folder lacks, as on another machine: they are kept."""
    places = {points_of(cell_of(run), work): run for run in found["runs"]}
    if "base" in found:
        places[work / "base.json"] = found["base"]
    for place, value in places.items():
        if not place.is_file():
            files.write_json(place, value)


def cell_of(run: Mapping[str, Any]) -> Cell:
    return Cell(run["method"], run["rate"], run["seed"])


def points_of(cell: Cell, work: Path) -> Path:
    return work / "cells" / cell.id / "points.json"


def make_pairs(o: argparse.Namespace, work: Path) -> Path:
    """The base's own answers, best against worst."""
    from fpo_mlx import pipeline
    from fpo_mlx.pairs.settings import BuildConfig, GenerateConfig, JudgeConfig

    prompts, candidates = o.work / "prompts.txt", o.work / "candidates.jsonl"
    verdicts, pairs = work / "verdicts.jsonl", work / "pairs"
    if (pairs / "pairs.json").is_file():
        return pairs
    files.write_text(prompts, "".join(f"{p}\n" for p in known.training_prompts()))
    settings = GenerateConfig(model=str(o.model), prompts=str(prompts), n=4, max_tokens=32, seed=1)
    say(f"pairs generate: {pipeline.pairs_generate(settings, output=candidates, say=say)}")
    reward = f"{Path(known.__file__).resolve()}:{o.reward}"
    pipeline.pairs_judge(
        JudgeConfig(reward=reward), candidates=candidates, output=verdicts, say=say
    )
    pipeline.pairs_build(
        BuildConfig(keep_cut=True, valid_share=0.05, seed=0, force=True),
        candidates=candidates, verdicts=[verdicts], output=pairs, say=say,
    )  # fmt: skip
    return pairs


def train(cell: Cell, o: argparse.Namespace, data: Path, work: Path) -> Path:
    """One `fpo-mlx train` of UPDATES updates; a run that was stopped goes on."""
    out = work / "cells" / cell.id / "adapters"
    words = {
        "model": o.model, "sae": o.sae, "data": data, "adapter-path": out, "seed": cell.seed,
        "learning-rate": cell.rate, "batch-size": BATCH, "micro-batch-size": 2, "iters": UPDATES,
        "save-every": 6, "steps-per-report": 1, "steps-per-eval": 10_000, "val-batches": 0,
        "max-logp-drop": 1e9,  # the guard is not what is compared
    }  # fmt: skip
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if (out / "checkpoint").is_dir():
        flags.append("--resume")
    elif out.is_dir():
        shutil.rmtree(out)  # of a run that was killed before its first checkpoint
    done = subprocess.run(
        [sys.executable, "-m", "fpo_mlx", "train", *flags, *METHODS[cell.method], "--no-check-sae"],
        env={**os.environ, **one, "FPO_MLX_CACHE": str(o.work / "cache")},
        stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    files.write_text(work / "cells" / cell.id / "train.log", done.stdout)
    if done.returncode not in (0, 4):  # 4: the guard; then there is nothing to measure
        raise SystemExit(f"{cell.id}: train ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return out


def open_meter(o: argparse.Namespace, work: Path) -> Any:
    from frontier_points import Meter

    from fpo_mlx import read_sae

    meter = Meter(o.model, read_sae(o.sae), o.reward)
    if not (work / "base.json").is_file():
        files.write_json(work / "base.json", meter.point(None))
    return meter


def measure(cell: Cell, meter: Any, adapters: Path, work: Path) -> None:
    """Parts of the change at the end; each point is kept as soon as it is there."""
    place = work / "cells" / cell.id
    weights = adapters / f"{UPDATES:07d}_adapters.safetensors"
    points = []
    for part in PARTS.get(cell.method, USUAL_PARTS):
        path = place / f"point-{UPDATES}-{part:g}.json"
        if not path.is_file() and weights.is_file():
            folder = as_adapter(adapters, UPDATES, place / "at")
            point = meter.point(folder, part)
            say(f"  {cell.id} x {part:g}: {brief(point)}")
            files.write_json(path, {"update": UPDATES, "part": part} | point)
        if path.is_file():
            points.append(json.loads(path.read_text(encoding="utf-8")))
            if points[-1]["kl"] > frontier_show.LEVELS[-1]:
                break
    about = {"method": cell.method, "rate": cell.rate, "seed": cell.seed}
    files.write_json(place / "points.json", {**about, "points": points})


def brief(point: dict[str, Any]) -> str:
    names: Sequence[str] = ("reward", "kl", "unrelated_drift", "greedy_agreement")
    return "  ".join(f"{name} {point[name]:.3f}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
