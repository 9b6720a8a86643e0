"""Does --target-drift hold what it names? One short training per cell, judged on held-out pairs.

    python scripts/studies/drift_targets.py --model smollm2=MODEL --sae smollm2/topk=SAE \\
        --model small=small/model --sae small/topk=small/sae --data PAIRS
    python scripts/studies/drift_targets.py --sae … --list   # what there is, and what is kept

A cell is an SAE, a target, a learning rate, a batch size and a seed; target 0 is the control, the
same training without a constraint. It says how far features move when nothing holds them, and a
target above that is not run: no alpha reaches it. Each is one `fpo-mlx train`, which at its end
takes the part of the change that meets the target on validation pairs; `fpo-mlx evaluate` then
gives the drift r of the saved adapters on other pairs: the root of the mean relative D of the
rejected answers. A control has that of its last validation, as have cells of before the ends were
landed (no part in the table), until they are run again. Others that are kept in the results are not
run again, so a stopped study goes on. The figures are in
scripts/studies/results/drift_targets.json and .md. small_model.py makes the small model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from texts import ROOT, in_time, shared, short_pairs

from fpo_mlx.storage import files

RESULTS = ROOT / "scripts" / "studies" / "results"
TARGETS = (0.1, 0.2, 0.05, 0.3)
# updates by batch size, longest sequence in tokens: the small model has a small vocabulary
UPDATES = {"smollm2": {1: 160, 4: 80, 16: 30}, "small": {1: 240, 4: 120, 16: 60}}
LONGEST = {"smollm2": 192, "small": 320}
HELD_OUT = 40
MEASURED = (
    "drift/rejected", "drift/chosen", "rewards/margins", "rewards/accuracies",
    "logps_per_token/chosen_change",
)  # fmt: skip
GUARD = 4  # the exit code of a run that the guard stopped
Kept = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """model and sae name what is trained; target 0: no constraint."""

    model: str
    sae: str
    target: float
    learning_rate: float
    batch_size: int
    seed: int

    @property
    def id(self) -> str:
        rate = f"{self.learning_rate:.0e}"
        return f"{self.model}-{self.sae}-r{self.target:g}-lr{rate}-b{self.batch_size}-s{self.seed}"

    @property
    def control(self) -> Cell:
        return replace(self, target=0.0)


def cells(saes: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Each control before what it is the control of; every SAE before the rates and batches.

    saes: "model/sae".
    """
    names = [name.split("/") for name in saes]
    first = {model: sae for model, sae in reversed(names)}
    plan = [(model, sae, 2e-5, 1) for model, sae in names if model == "smollm2"]
    for rate, size in ((1e-4, 1), (1e-4, 4), (1e-5, 1), (1e-4, 16), (5e-5, 1), (2e-5, 4)):
        plan += [  # rates and batches: with one SAE of SmolLM2
            (model, sae, rate, size)
            for model, sae in names
            if model == "small" or sae == first[model]
        ]
    for model, sae, rate, size in plan:
        for seed in range(seeds if model == "small" and size < 16 else 1):
            for target in (0.0, *TARGETS):
                yield Cell(model, sae, target, rate, size, seed)


def main() -> int:
    options = parse()
    models, saes = (dict(o.split("=", 1) for o in given) for given in (options.model, options.sae))
    path = RESULTS / "drift_targets.json"
    kept: Kept = json.loads(path.read_text()) if path.is_file() else {}
    plan = list(cells(list(saes), options.seeds))
    if options.list:
        for cell in plan:
            beyond = "out of reach" if out_of_reach(cell, kept) else "open"
            print("kept" if is_kept(cell, kept) else beyond, cell.id)
        return 0
    if missing := {name.split("/")[0] for name in saes} - set(models):
        raise SystemExit(f"--model is missing for {', '.join(sorted(missing))}")
    held_out = {"valid": HELD_OUT, "test": HELD_OUT}
    data = short_pairs(options.data, options.work / "data", held_out)
    for cell in in_time(options.minutes, plan):
        if is_kept(cell, kept) or out_of_reach(cell, kept):
            continue
        sae = saes[f"{cell.model}/{cell.sae}"]
        kept[cell.id] = asdict(cell) | run(cell, models[cell.model], sae, data, options.work)
        print(cell.id, json.dumps(kept[cell.id]["held_out"]), flush=True)
        files.write_json(path, kept)
        files.write_text(path.with_suffix(".md"), markdown(kept))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=shared("data"))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--sae", action="append", required=True, metavar="MODEL/NAME=PATH")
    parser.add_argument("--work", type=Path, default=ROOT / ".drift-targets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def is_kept(cell: Cell, kept: Mapping[str, Mapping[str, Any]]) -> bool:
    found = kept.get(cell.id)
    return found is not None and (
        not cell.target or "whole" in found or found["exit_code"] == GUARD
    )


def out_of_reach(cell: Cell, kept: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the control, free to move, stayed below the target."""
    free = kept.get(cell.control.id)
    return bool(cell.target and free) and free["held_out"]["drift"] < cell.target


def run(cell: Cell, model: str, sae: str, data: Path, work: Path) -> dict[str, Any]:
    """Train, and judge what was saved; of a control and a stopped run what its log says."""
    out = work / cell.id
    words = {
        "model": model, "sae": sae, "data": data, "adapter-path": out, "seed": cell.seed,
        "max-seq-length": LONGEST[cell.model], "learning-rate": cell.learning_rate,
        "batch-size": cell.batch_size, "iters": UPDATES[cell.model][cell.batch_size],
        "steps-per-report": 1, "steps-per-eval": 10_000, "val-batches": -1, "save-every": 10_000,
        **({"target-drift": cell.target} if cell.target else {"alpha": 0}),
    }  # fmt: skip
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    begun = time.monotonic()
    code = fpo_mlx("train", *flags, "--overwrite", work=work)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"exit_code": code, "held_out": held_out(log)}
    if cell.target and code == 0:
        found |= {"whole": found["held_out"], "part": part(log), "held_out": judged(words, work)}
    found["alphas"] = [entry.get("alpha", 0.0) for entry in log if entry["kind"] == "train"]
    return found | {"seconds": time.monotonic() - begun}


def fpo_mlx(*words: str, work: Path) -> int:
    """0, or the exit code of a run that the guard stopped."""
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fpo_mlx", *words, "--no-check-sae"],
        env={**os.environ, **one, "FPO_MLX_CACHE": str(work / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, GUARD):
        raise SystemExit(f"{' '.join(words)} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return done.returncode


def part(log: Sequence[Mapping[str, Any]]) -> float:
    """Of the change, that was saved; 1 where there was no need of less or more."""
    return next((entry["part"] for entry in reversed(log) if entry["kind"] == "landed"), 1.0)


def judged(words: Mapping[str, Any], work: Path) -> dict[str, float]:
    """The saved adapters on pairs that neither the training nor its end has seen."""
    same = ("model", "sae", "data", "adapter-path", "max-seq-length")
    flags = [str(word) for name in same for word in (f"--{name}", words[name])]
    to = work / "judged.json"
    fpo_mlx(
        "evaluate", *flags, "--split", "test", "--no-kl", "--samples", "0", "--overwrite",
        "--json", str(to), work=work,
    )  # fmt: skip
    return figures(json.loads(to.read_text())["summary"])


def held_out(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the last validation; of the last reports of training where the guard came before it."""
    last = max(n for n, entry in enumerate(log) if entry["kind"] == "valid")
    found = [log[last]] if log[last]["iteration"] else log[last + 1 :][-20:]
    return figures({n: statistics.fmean(e["metrics"][n] for e in found) for n in MEASURED})


def figures(mean: Mapping[str, float]) -> dict[str, float]:
    return {
        "drift": mean["drift/rejected"] ** 0.5,
        "drift_chosen": mean["drift/chosen"] ** 0.5,
        "margin": mean["rewards/margins"] / 0.1,  # nats per token: beta is 0.1
        "accuracy": mean["rewards/accuracies"],
        "chosen_change": mean["logps_per_token/chosen_change"],
    }


def markdown(kept: Mapping[str, Mapping[str, Any]]) -> str:
    held = [c for c in kept.values() if c["target"]]
    lines = [
        "# Does --target-drift hold what it names?", "",
        "Written by `scripts/studies/drift_targets.py`; do not edit. SAEs after block "
        f"27 (of 30) of SmolLM2-135M, 3 (of 4) of the small model; {HELD_OUT} held-out pairs. "
        "Free: drift of the same training without a constraint (of some cells on a little more of "
        "the same pairs); a target above it was not run. "
        "Whole: of the whole change on the validation pairs, over the target; part: of the change, "
        "that was saved; held-out drift: of that part, on other pairs (without a part: a run of "
        "before ends were landed, its whole change on validation pairs).", "",
        *(f"- {line}" for model in UPDATES for line in summary(model, held)), "",
        "| model | SAE | learning rate | batch | seed | free | target | whole | part "
        "| held-out drift | over target | margin | accuracy | chosen, nats per token "
        "| alpha at the end | exit code |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = list(Cell.__dataclass_fields__)
    for c in held:
        free = kept[Cell(**{name: c[name] for name in names}).control.id]["held_out"]["drift"]
        h, ended = c["held_out"], "|"
        if "whole" in c:
            ended = f"{c['whole']['drift'] / c['target']:.2f} | {c['part']:.2f}"
        lines.append(
            f"| {c['model']} | {c['sae']} | {c['learning_rate']:.0e} | {c['batch_size']} | "
            f"{c['seed']} | {free:.3f} | {c['target']:g} | {ended} | {h['drift']:.3f} | "
            f"{h['drift'] / c['target']:.2f} | {h['margin']:.3f} | {h['accuracy']:.2f} | "
            f"{h['chosen_change']:+.3f} | {c['alphas'][-1]:.3g} | {c['exit_code']} |"
        )
    return "\n".join(lines) + "\n"


def summary(model: str, held: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of a model's runs as they ended, as they were saved, and of those of before."""
    own = [c for c in held if c["model"] == model]
    landed = [c for c in own if "whole" in c]
    yield f"{model}: {near(landed, 'held_out')}"
    if landed:
        yield f"{model}, the whole changes: {near(landed, 'whole')}"
    if others := [c for c in own if "whole" not in c]:
        stopped = sum(c["exit_code"] == GUARD for c in others)
        yield (
            f"{model}, not landed: {near(others, 'held_out')} "
            f"({stopped} stopped by the guard; their drift: of the last 20 updates)"
        )


def near(cells: Sequence[Mapping[str, Any]], of: str) -> str:
    if not cells:
        return "none run yet."
    ratios = [c[of]["drift"] / c["target"] for c in cells]
    within = sum(0.9 <= ratio <= 1.1 for ratio in ratios)
    return (
        f"{len(ratios)} runs, {within} within 10 % of the target, ratio {min(ratios):.2f} to "
        f"{max(ratios):.2f}, median {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
