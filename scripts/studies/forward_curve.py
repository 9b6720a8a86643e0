"""The demo's pairs with --gradient forward and with backpropagation, by update and by minute.

    python scripts/studies/forward_curve.py              everything; run it again to go on
    python scripts/studies/forward_curve.py --updates 50 a look

FPO with the demo's SAE, one pair per update; every curve is one `fpo-mlx train` that validates on
all held-out pairs along the way. Minutes are those of the updates, without validation. Forward-only
runs need another learning rate, so several are tried, with SGD (the method's own) and with Adam.
results/forward_curve.json and .md are written anew after each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import reproduce
import reproduce_cells as rc

from fpo_mlx.demo import run as demo
from fpo_mlx.demo import smollm2
from fpo_mlx.storage.files import write_json, write_text

RESULTS = rc.ROOT / "scripts" / "studies" / "results"
SGD = ("--gradient", "forward", "--optimizer", "sgd", "--max-grad-norm", "0")
CURVES = {
    "backward, adam 5e-5": ("--learning-rate", "5e-5"),
    "forward, sgd 3e-4": (*SGD, "--learning-rate", "3e-4"),
    "forward, sgd 3e-3": (*SGD, "--learning-rate", "3e-3"),
    "forward, adam 5e-5": ("--gradient", "forward", "--learning-rate", "5e-5"),
}
SHORTER = 4  # backpropagation gets a quarter of the updates; it is done by then


def main(words: Sequence[str] | None = None) -> int:
    o = parse(words)
    model = o.model or smollm2.fetch(say=lambda text: print(text, file=sys.stderr)).full
    run, failed, curves = reproduce.in_subprocess(jobs=2), 0, {}
    for name, flags in CURVES.items():
        updates = max(1, o.updates // SHORTER) if name.startswith("backward") else o.updates
        out = o.work / f"{name.replace(', ', '-').replace(' ', '-')}-{updates}"
        if not (out / "adapters.safetensors").exists():
            line = train_words(o, model, out, updates, flags)
            line += ["--resume"] if (out / "checkpoint").exists() else []
            code = run(line, o.work / f"{out.name}.log")
            failed += code not in (0, rc.DIVERGED)
        if (out / "metrics.jsonl").is_file():
            curves[name] = curve(out)
            write(o, curves)
    return 1 if failed else 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=rc.ROOT / ".reproduce" / "forward")
    parser.add_argument("--model", type=Path, help="folder of the model (SmolLM2-135M-Instruct)")
    parser.add_argument("--updates", type=int, default=320, help="of the forward-only runs")
    return parser.parse_args(words)


def train_words(
    o: argparse.Namespace, model: Path, out: Path, updates: int, flags: Sequence[str]
) -> list[str]:
    settings = {
        "model": model, "sae": demo.SAE, "data": demo.DATA, "reference": o.work / "reference",
        "adapter-path": out, "feature-scale": "raw", "batch-size": 1, "iters": updates,
        "steps-per-report": max(1, updates // 16), "steps-per-eval": max(1, updates // 4),
        "val-batches": -1, "save-every": max(1, updates // 4),
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["train", *words, "--no-check-sae", *flags]


def curve(out: Path) -> list[dict[str, float]]:
    """Loss and accuracy of the held-out pairs, with the updates and the minutes before them."""
    points, minutes, pairs = [], 0.0, 0
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "train":
            minutes += (entry["pairs"] - pairs) / entry["pairs_per_second"] / 60
            pairs = entry["pairs"]
        elif entry["kind"] == "valid":
            points.append(
                {
                    "update": entry["iteration"], "minutes": minutes, "loss": entry["loss"],
                    "accuracy": entry["metrics"]["rewards/accuracies"],
                }
            )  # fmt: skip
    return points


def write(o: argparse.Namespace, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    o.output.mkdir(parents=True, exist_ok=True)
    write_json(o.output / "forward_curve.json", {"updates": o.updates, "curves": curves})
    lines = [
        "# Without a backward pass", "",
        "`python scripts/studies/forward_curve.py`: the demo's pairs, FPO, one pair per update, "
        "all held-out pairs; minutes of the updates alone.", "",
        "| run | update | minutes | held-out loss | accuracy |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, points in curves.items():
        lines += [
            f"| {name} | {p['update']} | {p['minutes']:.2f} | {p['loss']:.4f} | "
            f"{p['accuracy']:.2f} |"
            for p in points
        ]
    write_text(o.output / "forward_curve.md", "\n".join([*lines, ""]))


if __name__ == "__main__":
    sys.exit(main())
