"""What reproduce.py runs: the cells of the study, their commands, and what is kept of each."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpo_mlx.storage.files import write_json

ROOT = Path(__file__).resolve().parents[2]
Say = Callable[[str], None]
Run = Callable[[list[str], Path], int]  # words of fpo-mlx, log file -> exit code
DIVERGED = 4
METHODS = ("dpo", "simpo", "simpo-kl", "tdpo1", "tdpo2", "fpo")
ALPHAS, TOP_KS = (0.1, 1.0, 2.0), (10, 25, 200)  # beside the presets' 0.5 and 50


@dataclass(frozen=True)
class Plan:
    """What all cells share. saes: name -> place; the first is what D is measured with."""

    model: Path
    saes: Mapping[str, Path]
    data: Path
    work: Path
    updates: int = 80
    batch_size: int = 1
    learning_rate: float = 2e-5
    max_seq_length: int = 192
    max_tokens: int = 64
    samples: int = 24
    seeds: int = 1
    top_k: int = 50
    top_ks: Sequence[int] = TOP_KS
    extra: Sequence[str] = ()  # words for every training

    @property
    def sae(self) -> str:
        return next(iter(self.saes))


@dataclass(frozen=True)
class Cell:
    """One training with its evaluation; without an objective the base alone."""

    name: str
    group: str  # base, method or ablation
    varies: str  # what an ablation changes
    seed: int = 0
    words: Sequence[str] = ()  # of the objective
    sae: str = ""  # trained with this one in place of the plan's first

    @property
    def id(self) -> str:
        return f"{self.name}.s{self.seed}".replace("/", "-").replace(" ", "-")


@dataclass(frozen=True)
class Outcome:
    cell: Cell
    record: dict[str, Any] | None  # None: it failed
    note: str = ""
    seconds: float = field(default=0.0, compare=False)


def cells(plan: Plan) -> list[Cell]:
    """Most telling first, so that a budget that ends early still leaves a whole table."""
    methods = [
        Cell(name, "method", "", seed, ("--objective", name))
        for seed in range(plan.seeds)
        for name in METHODS
    ]
    first = [c for c in methods if c.seed == 0]
    return [Cell("base", "base", ""), *first, *ablations(plan), *methods[len(first) :]]


def ablations(plan: Plan) -> list[Cell]:
    """FPO with one thing changed."""
    found = [Cell("fpo no constraint", "ablation", "alpha", words=("--constraint", "none"))]
    found += [
        Cell(f"fpo alpha {a:g}", "ablation", "alpha", words=("--alpha", f"{a:g}")) for a in ALPHAS
    ]
    found += [
        Cell("fpo no stop-gradient", "ablation", "stop-gradient", words=("--no-stop-gradient",)),
        Cell("fpo activations", "ablation", "constraint", words=("--constraint", "activations")),
        Cell("fpo scaled D", "ablation", "feature scale", words=("--feature-scale", "reference")),
    ]
    found += [
        Cell(f"fpo top-k {k}", "ablation", "top-k", words=("--top-k", str(k)))
        for k in plan.top_ks
        if k != plan.top_k
    ]
    others = [name for name in plan.saes if name != plan.sae]
    return found + [Cell(f"fpo {name}", "ablation", "site", sae=name) for name in others]


def write_data(source: Path, folder: Path, train: int, held_out: int, seed: int = 0) -> Path:
    """The first pairs of train.jsonl and of valid.jsonl or test.jsonl, as train and test."""
    valid = next(p for n in ("valid", "test") if (p := source / f"{n}.jsonl").is_file())
    for name, path, n in (("train", source / "train.jsonl", train), ("test", valid, held_out)):
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        random.Random(seed).shuffle(lines)
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in lines[:n])
        target = folder / f"{name}.jsonl"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
    return folder


def usual(plan: Plan, sae: str) -> list[str]:
    flags = {
        "model": plan.model, "sae": plan.saes[sae], "data": plan.data,
        "max-seq-length": plan.max_seq_length,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def reference(plan: Plan, sae: str, cell: Cell | None = None) -> Path:
    """The cache of an SAE; bare activations are pooled otherwise and have one of their own."""
    bare = "-activations" if cell and "activations" in cell.words else ""
    return plan.work / f"reference-{sae}{bare}"


def precompute_words(plan: Plan, sae: str) -> list[str]:
    to = ["--output", str(reference(plan, sae)), "--split", "all"]
    return ["precompute", *usual(plan, sae), *to]


def train_words(plan: Plan, cell: Cell, adapters: Path) -> list[str]:
    """The same pairs, order, updates and adapted blocks for every method."""
    sae = cell.sae or plan.sae
    flags = {
        "reference": reference(plan, sae, cell), "iters": plan.updates,
        "batch-size": plan.batch_size, "learning-rate": plan.learning_rate,
        "seed": cell.seed, "top-k": plan.top_k,
        "steps-per-report": max(1, plan.updates // 30), "save-every": max(1, plan.updates // 3),
        "adapter-path": adapters,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["train", *usual(plan, sae), *words, *plan.extra, *cell.words]


def evaluate_words(plan: Plan, cell: Cell, adapters: Path, to: Path) -> list[str]:
    """Every cell is judged by FPO's rewards and with one SAE, so that figures mean the same."""
    words = ["evaluate", *usual(plan, plan.sae), "--reference", str(reference(plan, plan.sae))]
    words += ["--objective", "fpo", "--split", "test"]
    words += ["--top-k", str(plan.top_k), "--json", str(to)]
    words += ["--samples", str(plan.samples), "--max-tokens", str(plan.max_tokens)]
    return words + (["--adapter-path", str(adapters)] if cell.words or cell.sae else [])


def place_of(plan: Plan, cell: Cell) -> Path:
    """A folder of its own for a cell as it is set up now: another setup is another folder."""
    nowhere = Path("x")
    said = [train_words(plan, cell, nowhere), evaluate_words(plan, cell, nowhere, nowhere)]
    return plan.work / "cells" / f"{cell.id}-{hashlib.sha256(repr(said).encode()).hexdigest()[:8]}"


def finished(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """What an earlier run kept of this cell."""
    path = place_of(plan, cell) / "cell.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_cell(plan: Plan, cell: Cell, run: Run) -> tuple[dict[str, Any] | None, str]:
    """Train where there is something to train, evaluate, keep. None and why where it failed."""
    place = place_of(plan, cell)
    place.mkdir(parents=True, exist_ok=True)
    adapters, log, to = place / "adapters", place / "log.txt", place / "evaluate.json"
    trained = bool(cell.words or cell.sae)
    status = "done"
    if trained:
        words = train_words(plan, cell, adapters)
        begun = (adapters / "checkpoint" / "state.safetensors").exists()
        code = run([*words, "--resume"] if begun else words, log)
        if code == DIVERGED and (adapters / "adapters.safetensors").exists():
            status = "diverged"
        elif code:
            return None, f"train ended with exit code {code}; see {log}"
    if code := run(evaluate_words(plan, cell, adapters, to), log):
        return None, f"evaluate ended with exit code {code}; see {log}"
    result = json.loads(to.read_text(encoding="utf-8"))
    record = {
        "name": cell.name, "group": cell.group, "varies": cell.varies, "seed": cell.seed,
        "words": list(cell.words), "sae": cell.sae or plan.sae, "status": status,
        "training": training(adapters / "metrics.jsonl") if trained else None,
        "summary": result["summary"],
    }  # fmt: skip
    write_json(place / "cell.json", record)
    return record, ""


def training(metrics: Path) -> dict[str, Any]:
    """Updates, seconds of one, peak memory, and the course of the run."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    reports = [line for line in lines if line["kind"] == "train"]
    if not reports:
        return {"updates": 0, "seconds_per_pair": None, "peak_memory_gb": None, "course": []}
    speeds = [r["pairs_per_second"] for r in reports if r["pairs_per_second"] > 0]
    keys = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
    return {
        "updates": reports[-1]["iteration"],
        "seconds_per_pair": statistics.median(1 / s for s in speeds) if speeds else None,
        "peak_memory_gb": max(r["peak_memory_gb"] for r in reports),
        "course": [
            {"iteration": r["iteration"]} | {k: finite(r["metrics"].get(k)) for k in keys}
            for r in reports
        ],
    }


def finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
