"""Feature control at equal margin: does holding or projecting out a behaviour's features hold it?

    python scripts/studies/control_margin.py [--behaviour list|offer] [--seeds 3] [--work DIR]
    python scripts/studies/control_margin.py … --seed 1     this one only: a core for each

Six ways to train on the same pairs: FPO; with the behaviour's features held (`--feature-weights`),
or projected out (`--project-out`); each with as many unrelated ones of equal activity in their
place; and DPO, which nothing holds. Every run keeps checkpoints along the way. Of each checkpoint:
the margin on held-out pairs and the rate of the behaviour in `--answers` sampled answers (batched).
The rates are then compared at the margin that all kinds reach, by straight lines between their
checkpoints, with intervals from a bootstrap over prompts, seeds together. What is trained is kept
in --work, what was measured in results/control_margin_BEHAVIOUR/: a stopped study goes on, and what
was measured is not measured again on another machine. Hours for a seed on one core; `--smoke` takes
minutes and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import control
import numpy as np
from control import judge
from texts import (
    ROOT,
    Steps,
    as_adapter,
    begin,
    goes_on,
    is_list,
    rows,
    say,
    study_parser,
    write_rows,
)

from fpo_mlx import machine, pipeline
from fpo_mlx.config import Sampling, load_config
from fpo_mlx.storage import files

KINDS: dict[str, tuple[str | None, str | None]] = {  # setting, whose features
    "fpo": (None, None),
    "held": ("feature_weights", "own"),
    "held, unrelated": ("feature_weights", "others"),
    "out": ("project_out", "own"),
    "out, unrelated": ("project_out", "others"),
    "dpo": (None, None),
}
OFFER = re.compile(r"(\?|let me know[^.!?]*[.!]|feel free[^.!?]*[.!])\s*$", re.IGNORECASE)


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "control-margin-work")
    parser.add_argument("--output", type=Path, help="folder of what is measured")
    parser.add_argument("--behaviour", choices=["list", "offer"], default="list")
    parser.add_argument("--iters", type=int, default=400, help="updates of one pair")
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--train-pairs", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=100, help="held-out pairs, and prompts")
    parser.add_argument("--answers", type=int, default=1000, help="sampled per checkpoint and seed")
    parser.add_argument("--tokens", type=int, help="of a sampled answer (list: 64, offer: 160)")
    parser.add_argument("--seed", type=int, action="append", default=[], help="these, not all")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--texts", type=int, default=60, help="of each kind, to find features")
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--weight", type=float, default=100.0)
    parser.add_argument("--max-seq-length", type=int, default=320)
    parser.add_argument("--smoke", action="store_true", help="a run that proves nothing")
    o = parser.parse_args()
    o.tokens = o.tokens or (64 if o.behaviour == "list" else 160)  # an offer is at the end
    if o.smoke:
        o.seeds, o.iters, o.checkpoints, o.train_pairs, o.pairs = 1, 2, 2, 2, 2
        o.answers, o.tokens, o.texts, o.features = 4, 8, 6, 2
    return o


def main() -> None:
    machine.set_up()
    o = parse()
    model, steps = begin(o)
    data = control.split(o)
    base = {
        "model": model, "sae": (str(o.sae),), "data": str(data),
        "max_seq_length": o.max_seq_length,
    }  # fmt: skip
    files_of = {"own": o.work / "own.csv", "others": o.work / "others.csv"}
    texts = text_sets(o)
    found = steps("features", lambda: find(o, base, texts, files_of["own"]))
    others = steps("others", lambda: find_others(base, o, found, texts, files_of["others"]))
    results = o.work if o.smoke else ROOT / "scripts" / "studies" / "results"
    place = o.output or results / f"control_margin_{o.behaviour}"
    anywhere = {"model": Path(model).name, "sae": o.sae.name, "data": o.data.name}
    points = Steps(place, steps.settings | anywhere)  # without this machine's paths
    for seed in o.seed or range(o.seeds):
        points(f"base-{seed}", lambda s=seed: {
            "kind": "base", "seed": s, "margin": 0.0, **answers(o, base, None, s)})  # fmt: skip
        for kind, (setting, whose) in KINDS.items():
            own = base | ({setting: str(files_of[whose])} if setting and whose else {})
            folder = o.work / f"{kind.replace(', ', '-')}-{seed}"
            names = {f"{folder.name}-{iteration}": iteration for iteration in marks(o)}
            if not all(map(points.done, names)):
                steps(f"train-{folder.name}", lambda c=own, f=folder, s=seed, k=kind: train(
                    o, c, f, s, k))  # fmt: skip
            for name, iteration in names.items():
                points(name, lambda k=kind, s=seed, i=iteration, f=folder: point(
                    o, base, f, k, s, i))  # fmt: skip
            write(place, found, others, o.smoke)


def point(
    o: argparse.Namespace, base: dict[str, Any], folder: Path, kind: str, seed: int, iteration: int
) -> dict[str, Any]:
    """One checkpoint: its margin, and how often its answers show the behaviour."""
    part = as_adapter(folder, iteration, folder / f"at-{iteration}")
    about = {"kind": kind, "seed": seed, "iteration": iteration}
    return about | measured(o, base, part) | answers(o, base, part, seed)


def write(place: Path, found: list[Any], others: list[Any], smoke: bool) -> None:
    """The comparison, from all points that are there."""
    steps = files.listed(place / "steps", "*.json")
    points = [json.loads(p.read_text()) for p in steps if p.name != "settings.json"]
    result = {"features": found, "others": others, "smoke": smoke}
    result["at equal margin"] = equal_margin(points)
    files.write_json(place / "compared.json", result)
    print(json.dumps(result["at equal margin"], indent=2), flush=True)


def marks(o: argparse.Namespace) -> list[int]:
    every = o.iters // o.checkpoints
    return [every * (i + 1) for i in range(o.checkpoints)]


def shows(text: str, behaviour: str) -> bool:
    return is_list(text) if behaviour == "list" else bool(OFFER.search(text.strip()))


def text_sets(o: argparse.Namespace) -> tuple[Path, Path]:
    """Training answers with the behaviour and without, by one writer."""
    sets: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for row in rows(o.data / "train.jsonl"):
        own = sets[shows(row["chosen"], o.behaviour)]
        if len(own) < o.texts:
            own.append({"prompt": row["prompt"], "response": row["chosen"]})
    return (
        write_rows(o.work / "with.jsonl", sets[True]),
        write_rows(o.work / "without.jsonl", sets[False]),
    )


def find(
    o: argparse.Namespace, base: dict[str, Any], texts: tuple[Path, Path], place: Path
) -> list[dict[str, Any]]:
    found = pipeline.find_features(
        load_config(base), positive=texts[0], negative=texts[1], limit=o.texts, top=o.features,
        say=say,
    )  # fmt: skip
    kept = [{"feature": one.feature, "weight": o.weight} for one in found]
    control.write_weights(place, kept)
    return [{**row, "auc": one.auc} for row, one in zip(kept, found, strict=True)]


def find_others(
    base: dict[str, Any], o: argparse.Namespace, found: list[dict[str, Any]],
    texts: tuple[Path, Path], place: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    seen = pipeline.text_activations(load_config(base), texts, limit=o.texts, say=say)
    twins = control.twins([one["feature"] for one in found], seen[0].mean, seen[1].mean)
    control.write_weights(place, [{"feature": t["feature"], "weight": o.weight} for t in twins])
    return twins


def train(
    o: argparse.Namespace, config: dict[str, Any], folder: Path, seed: int, kind: str
) -> dict[str, Any]:
    own = config | {"adapter_path": str(folder), "seed": seed, "iters": o.iters, "batch_size": 1}
    own |= {"learning_rate": o.learning_rate, "val_batches": 0, "max_margin": 1e3}
    own |= {"save_every": o.iters // o.checkpoints, **goes_on(folder)}
    own |= {"objective": "dpo" if kind == "dpo" else "fpo"}
    last: Any = None
    for report in pipeline.train(load_config(own), say=say):
        last = getattr(report, "loss", last)
    return {"loss": last}


def measured(o: argparse.Namespace, base: dict[str, Any], part: Path) -> dict[str, Any]:
    found = judge(o, base, part)
    return {"margin": found["rewards/margins"], "right": found["right"]}


def answers(
    o: argparse.Namespace, base: dict[str, Any], part: Path | None, seed: int
) -> dict[str, Any]:
    """The share of each prompt's sampled answers that show the behaviour; noise by the seed."""
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.judge.sampling import sample_all
    from fpo_mlx.judge.slots import Asked
    from fpo_mlx.model.open import open_model

    model, tokenizer = open_model(base["model"], adapter=part).model, load_tokenizer(base["model"])
    prompts = [row["prompt"] for row in rows(Path(base["data"]) / "valid.jsonl")]
    each = -(-o.answers // len(prompts))
    asked = [
        Asked(
            np.array(tokenizer.prompt_tokens([{"role": "user", "content": p}]), dtype=np.int32),
            [(seed, i, j) for j in range(each)],
        )
        for i, p in enumerate(prompts)
    ]
    seen = np.zeros(len(prompts))
    drawn = sample_all(model, asked, Sampling(o.tokens, 1.0, seed), tokenizer.eos_token_ids)
    for i, _, answer in drawn:
        text = tokenizer.decode(answer.tokens.tolist(), skip_special=True)
        seen[i] += shows(text, o.behaviour)
    return {"rates": (seen / each).tolist()}


def equal_margin(points: list[dict[str, Any]], draws: int = 2000) -> dict[str, Any]:
    """The rate of every kind at the margin that all reach, and its difference from fpo's.

    A run is a broken line through (0, the base's rate) and its checkpoints, in the order of their
    margins; prompts are drawn again, seeds together. Seeds that lack a kind are left out.
    """
    there = {(p["kind"], p["seed"]) for p in points}
    kinds = [kind for kind in dict.fromkeys(p["kind"] for p in points) if kind != "base"]
    seeds = sorted({s for _, s in there if all((kind, s) in there for kind in kinds)})
    if not seeds:
        return {}
    runs = {
        (kind, s): sorted(
            (p for p in points if p["seed"] == s and p["kind"] in (kind, "base")),
            key=lambda p: p["margin"],
        )
        for kind in kinds
        for s in seeds
    }
    margin = min(run[-1]["margin"] for run in runs.values())
    per_prompt = {
        kind: np.mean([_at(runs[kind, s], margin) for s in seeds], axis=0) for kind in kinds
    }
    rng = np.random.default_rng(0)
    n = len(next(iter(per_prompt.values())))
    picks = rng.integers(0, n, size=(draws, n))

    def interval(values: np.ndarray) -> list[float]:
        low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
        return [float(values.mean()), float(low), float(high)]

    return {
        "margin": float(margin),
        "rates": {kind: interval(values) for kind, values in per_prompt.items()},
        "less than fpo": {
            kind: interval(per_prompt["fpo"] - values)
            for kind, values in per_prompt.items()
            if kind != "fpo" and "fpo" in per_prompt
        },
    }


def _at(run: list[dict[str, Any]], margin: float) -> np.ndarray:
    """Each prompt's rate at a margin, [prompts]."""
    margins = np.array([p["margin"] for p in run])
    rates = np.array([p["rates"] for p in run])  # [points, prompts]
    return np.array([np.interp(margin, margins, column) for column in rates.T])


if __name__ == "__main__":
    main()
