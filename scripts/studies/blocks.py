"""Which block and site should FPO's SAE read? One SAE at each place, FPO with each, beside DPO.

    python scripts/studies/blocks.py [--blocks 9 18 27] [--sites resid_post mlp_out] [--seeds 3]

The paper's tables 3 and 7 in small. At each place an SAE is trained with the same width, k and
tokens; FPO then runs on the same pairs with each, every seed, and all are judged on held-out pairs:
accuracy, margin, log-prob of the chosen answers, KL, and D at the SAE's own place. Adapters are
where the tool puts them, at the SAE's block and below, so places differ in what may move as well;
`--all-blocks` adapts every block for all of them. Each cell is kept in --work, so a stopped run
goes on; a figure of the table is [mean, least, most] over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from texts import ROOT, Steps, rows, shared, write_rows

from fpo_mlx import machine, pipeline
from fpo_mlx.config import SaeTrainConfig, load_config
from fpo_mlx.demo import smollm2
from fpo_mlx.storage import files

FIGURES = (
    "rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change", "kl/chosen",
    "kl/rejected", "features/chosen", "features/rejected",
)  # fmt: skip
NOT_SAID = ("work", "output", "seeds", "blocks", "sites")  # more of them add cells to a work folder


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=shared("data"), help="pairs: train, valid")
    parser.add_argument("--texts", type=Path, default=shared("data") / "chats.jsonl")
    parser.add_argument("--blocks", type=int, nargs="+", default=[9, 18, 27])
    parser.add_argument("--sites", nargs="+", default=["resid_post", "mlp_out"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each SAE's training")
    parser.add_argument("--sae-batch-size", type=int, default=2048)
    parser.add_argument("--train-pairs", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=100, help="held-out pairs to judge on")
    parser.add_argument("--iters", type=int, default=300, help="updates of one pair")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-seq-length", type=int, default=320)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--all-blocks", action="store_true", help="adapt every block for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "blocks-work")
    parser.add_argument("--output", type=Path, help="result; default: results/blocks.json")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    o.model = o.model or smollm2.fetch(say=say).full
    settings = {k: str(v) for k, v in vars(o).items() if k not in NOT_SAID}
    steps = Steps(o.work, settings)
    data = o.work / "data"
    write_rows(data / "train.jsonl", rows(o.data / "train.jsonl")[: o.train_pairs])
    write_rows(data / "valid.jsonl", rows(o.data / "valid.jsonl")[: o.pairs])
    places = [f"{site}-{block}" for block in o.blocks for site in o.sites]
    saes = {p: steps(f"sae-{p}", lambda p=p: train_sae(o, p)) for p in places}
    runs: list[dict[str, Any]] = []
    for seed in range(o.seeds):
        for kind in ("dpo", *places):
            judged = steps(f"{kind}-{seed}", lambda k=kind, s=seed: cell(o, k, s))
            runs.append({"kind": kind, "seed": seed, **judged})
    result = {"settings": settings, "saes": saes, "runs": runs, "table": table(runs)}
    files.write_json(o.output or ROOT / "scripts" / "studies" / "results" / "blocks.json", result)
    print(json.dumps(result["table"], indent=2))


def train_sae(o: argparse.Namespace, place: str) -> dict[str, Any]:
    site, block = place.rsplit("-", 1)
    folder = o.work / f"sae-{place}"
    done = pipeline.sae_train(
        SaeTrainConfig(
            model=str(o.model), data=str(o.texts), output=str(folder), layer=int(block), site=site,
            width=o.width, k=o.k, training_tokens=o.tokens, batch_size=o.sae_batch_size,
            passes=1000.0, resume=(folder / "checkpoint.safetensors").exists(),
        ),
        say=say,
    )  # fmt: skip
    figures = {} if done.figures is None else {"fvu": done.figures.fvu, "dead": done.figures.dead}
    return figures | {"loss_recovered": None if done.loss is None else done.loss.recovered}


def cell(o: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """One training and what became of it. kind: "dpo", or a place whose SAE holds FPO."""
    base: dict[str, Any] = {
        "model": str(o.model), "data": str(o.work / "data"), "max_seq_length": o.max_seq_length,
        "reference": str(o.work / f"reference-{kind}"), "top_k": o.top_k,
    }  # fmt: skip
    base |= {"objective": "dpo"} if kind == "dpo" else {"sae": (str(o.work / f"sae-{kind}"),)}
    out = o.work / f"run-{kind}-{seed}"
    own = base | {"adapter_path": str(out), "seed": seed, "iters": o.iters, "batch_size": 1}
    own |= {"learning_rate": o.learning_rate, "resume": (out / "checkpoint").exists()}
    if o.all_blocks:
        own |= {"num_layers": -1, "adapt_above_sae": True}
    for _ in pipeline.train(load_config(own), say=say):
        pass
    report = pipeline.evaluate(load_config(base), adapter_path=str(out), split="valid", say=say)
    adapted = json.loads((out / "adapter_config.json").read_text())["num_layers"]
    found = {name: report.summary[name] for name in FIGURES if name in report.summary}
    return found | {"adapted_blocks": adapted}


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each kind: means over seeds, and the range of each."""
    made = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run for run in runs if run["kind"] == kind]
        row: dict[str, Any] = {"kind": kind, "seeds": len(own)}
        for name in (n for n in FIGURES if n in own[0]):
            values = [run[name] for run in own]
            row[name] = [statistics.fmean(values), min(values), max(values)]
        made.append(row)
    return made


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
