"""Two remedies measured: the likelihood term against collapse, and what holds against wrong labels.

    python scripts/studies/remedies.py               everything; run it again to go on
    python scripts/studies/remedies.py --minutes 60  begin no cell that would end later than this
    python scripts/studies/remedies.py --list        what is there, what is left

Collapse: SimPO and FPO without its constraint, with and without --nll-weight, at a learning rate
at which they were seen to destroy the answers. Labels: a fifth of the training pairs turned round
(others for every seed); DPO, the same smoothed, the same robust, and ada-dpo, judged on pairs that
were left as they are. Four pairs per update there: a clipped gradient of one pair has one length
whatever the loss weighs it by, and all four methods are the same. Three seeds each. Every cell is
one `fpo-mlx train` and one `fpo-mlx evaluate` in processes of their own, kept in --work;
results/remedies.json and .md are written anew after each. Intervals: 95 %, bootstrap over seeds
and, within each, over held-out pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import intervals
import numpy as np
import reproduce
import reproduce_cells as rc
from texts import gains

from fpo_mlx.demo import run as demo
from fpo_mlx.demo import smollm2
from fpo_mlx.storage.files import write_json, write_text

RESULTS = rc.ROOT / "scripts" / "studies" / "results"
FLIPPED = 0.2  # share of the training pairs whose labels are turned round
LABELS_RATE = 5e-5  # half as many updates as of the other study, and about as far
FREE = ("--constraint", "none")
ALIVE = ("--nll-weight", "1")
GENTLE = ("--nll-weight", "0.05")  # beside fpo's slope of beta / 2 what 1 is beside SimPO's
DOUBT = ("--objective", "dpo", "--label-smoothing", str(FLIPPED))
COLLAPSE = {
    "simpo": ("--objective", "simpo"),
    "simpo + nll": ("--objective", "simpo", *ALIVE),
    "fpo free": FREE,
    "fpo free + nll": (*FREE, *ALIVE),
    "fpo free + nll 0.05": (*FREE, *GENTLE),
}
NOISE = {
    "dpo": ("--objective", "dpo"),
    "dpo smoothed": DOUBT,
    "dpo robust": (*DOUBT, "--robust-smoothing"),
    "ada-dpo": ("--objective", "ada-dpo"),
}
STUDIES = {"collapse": COLLAPSE, "labels": NOISE}


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    started, plan = time.monotonic(), plan_of(options)
    work = [
        (group, rc.Cell(name, group, "", seed, methods[name]))
        for seed in range(options.seeds)
        for group, methods in STUDIES.items()
        for name in methods
        if not options.only or group in options.only
    ]
    plans = {(g, c.seed): data_plan(plan, g, c.seed, options) for g, c in work}
    left = [(g, c) for g, c in work if rc.finished(plans[g, c.seed], c) is None]
    if options.list:
        for group, cell in work:
            print(f"{'to do' if (group, cell) in left else 'kept':<6}{group:<10}{cell.id}")
        return 0
    run = reproduce.in_subprocess(jobs=2)  # 2: one thread a process
    if left and (
        code := run(
            [*rc.precompute_words(plan, plan.sae), "--no-check-sae"], plan.work / "reference.log"
        )
    ):
        say(f"precompute ended with exit code {code}; see {plan.work}/reference.log")
        return code
    longest, failed = 0.0, 0
    for group, cell in left:
        if reproduce.too_late(options.minutes and started + 60 * options.minutes, longest):
            say("time is up; the same command goes on")
            break
        began = time.monotonic()
        record, note = rc.run_cell(plans[group, cell.seed], cell, run)
        longest = max(longest, time.monotonic() - began)
        say(f"{group} {cell.id}: {note or record['status']} in {time.monotonic() - began:.0f} s")
        failed += record is None
        write(options, plan, work, plans)
    write(options, plan, work, plans)
    return 1 if failed else 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    add("--work", type=Path, default=rc.ROOT / ".reproduce" / "remedies", help="adapters, caches")
    add("--model", type=Path, help="folder of the model (SmolLM2-135M-Instruct)")
    add("--sae", type=Path, help="SAE that sets the adapted blocks and measures D (the demo's)")
    add("--data", type=Path, default=demo.DATA, help="folder with train.jsonl and valid.jsonl")
    add("--train-pairs", type=int, default=80, help="the shortest of train.jsonl")
    add("--held-out", type=int, default=30, help="the shortest of valid.jsonl or test.jsonl")
    add("--updates", type=int, default=rc.Plan.updates, help="of one pair; half of four (labels)")
    add("--learning-rate", type=float, default=rc.Plan.learning_rate)
    add("--max-seq-length", type=int, default=96, help="keeps a cell short; answers are cut")
    add("--seeds", type=int, default=3)
    add("--minutes", type=float, help="begin no cell that would end later than this")
    add("--only", action="append", choices=list(STUDIES), help="one of the studies")
    add("--list", action="store_true", help="say what there is to do, and do nothing")
    return parser.parse_args(words)


def plan_of(options: argparse.Namespace) -> rc.Plan:
    """What all cells share; its data are the pairs as they are."""
    sae = options.sae or demo.SAE
    plan = rc.Plan(
        options.model or smollm2.fetch(say=say).full, {sae.name: sae}, options.work / "data",
        options.work, options.updates, learning_rate=options.learning_rate,
        max_seq_length=options.max_seq_length, samples=0, seeds=options.seeds,
    )  # fmt: skip
    valid = next(p for n in ("valid", "test") if (p := options.data / f"{n}.jsonl").is_file())
    write_rows(
        plan.data / "train.jsonl", shortest(options.data / "train.jsonl", options.train_pairs)
    )
    write_rows(plan.data / "test.jsonl", shortest(valid, options.held_out))
    return plan


def data_plan(plan: rc.Plan, group: str, seed: int, options: argparse.Namespace) -> rc.Plan:
    """The plan with the training pairs of a study: as they are, or a fifth of them turned round."""
    if group != "labels":
        return plan
    folder = plan.work / f"data-flipped-{seed}"
    rows = read_rows(plan.data / "train.jsonl")
    turned = random.Random(seed).sample(range(len(rows)), round(FLIPPED * len(rows)))
    for i in turned:
        rows[i] |= {"chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]}
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", read_rows(plan.data / "test.jsonl"))
    return replace(of_labels(plan), data=folder)


def of_labels(plan: rc.Plan) -> rc.Plan:
    updates = max(1, plan.updates // 2)
    return replace(plan, batch_size=4, updates=updates, learning_rate=LABELS_RATE)


def shortest(path: Path, count: int) -> list[dict[str, Any]]:
    """In the file's order."""
    rows = read_rows(path)
    sizes = [len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) for r in rows]
    return [rows[i] for i in sorted(np.argsort(sizes, kind="stable")[:count].tolist())]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def figures(place: Path) -> dict[str, list[float]]:
    """Of every held-out pair: whether it was won, changes of log-probs a token, KL a token."""
    pairs = json.loads((place / "evaluate.json").read_text(encoding="utf-8"))["pairs"]
    chosen, rejected = (list(side) for side in zip(*map(gains, pairs), strict=True))
    return {
        "accuracy": [float(w > r) for w, r in zip(chosen, rejected, strict=True)],
        "chosen_change": chosen,
        "rejected_change": rejected,
        "kl": [p["chosen"]["kl"] / p["chosen"]["tokens"] for p in pairs],
    }


def interval(runs: Sequence[Sequence[float]]) -> list[float]:
    """Mean and 95 % interval; all runs judge the same pairs. runs: [seeds][pairs]."""
    table = np.array(runs)
    return [float(table.mean()), *intervals.drawn(table, 0 * table)]


def write(o: argparse.Namespace, plan: rc.Plan, work: Sequence, plans: Mapping) -> None:
    cells, table = [], {}
    for group, cell in work:
        own = plans[group, cell.seed]
        record = rc.finished(own, cell)
        if record is None:
            continue
        seen = figures(rc.place_of(own, cell))
        table.setdefault((group, cell.name), []).append((record["status"], seen))
        means = {name: float(np.mean(values)) for name, values in seen.items()}
        cells.append({
            "study": group, "method": cell.name, "seed": cell.seed, "words": list(cell.words),
            "status": record["status"], "updates": record["training"]["updates"], **means,
        })  # fmt: skip
    rows = [
        {
            "study": group, "method": name, "seeds": len(runs),
            "diverged": sum(status == "diverged" for status, _ in runs),
            **{n: interval([seen[n] for _, seen in runs]) for n in runs[0][1]},
        }
        for (group, name), runs in table.items()
    ]  # fmt: skip
    labels = of_labels(plan)
    judged = {len(seen["kl"]) for runs in table.values() for _, seen in runs}  # too long: left out
    said = ("train_pairs", "held_out", "updates", "learning_rate", "max_seq_length", "seeds")
    flags = [f"--{name.replace('_', '-')} {getattr(o, name)}" for name in said]
    facts = {
        "command": " ".join(["python scripts/studies/remedies.py", *flags]),
        "model": plan.model.name, "sae": plan.sae, "updates": plan.updates,
        "learning_rate": plan.learning_rate, "max_seq_length": plan.max_seq_length,
        "train_pairs": len(read_rows(plan.data / "train.jsonl")),
        "held_out_pairs": max(judged, default=0), "flipped": FLIPPED,
        "labels_updates": labels.updates, "labels_batch_size": labels.batch_size,
        "labels_learning_rate": labels.learning_rate,
        "cells_left": len(work) - len(cells),
    }  # fmt: skip
    o.output.mkdir(parents=True, exist_ok=True)
    write_json(o.output / "remedies.json", {"facts": facts, "table": rows, "cells": cells})
    write_text(o.output / "remedies.md", markdown(facts, rows))


def markdown(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
    lines = ["# Remedies", "", f"`{facts['command']}`: {said}.", ""]
    names = ("accuracy", "chosen_change", "rejected_change", "kl")
    for group in STUDIES:
        lines += [f"## {group}", "", f"| method | seeds | diverged | {' | '.join(names)} |"]
        lines += ["|---|---|---|" + "---|" * len(names)]
        for row in rows:
            if row["study"] == group:
                cells = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) for name in names)
                lines.append(f"| {row['method']} | {row['seeds']} | {row['diverged']} | {cells} |")
        lines.append("")
    lines += [
        "Mean over seeds and held-out pairs, 95 % interval in brackets. accuracy: share of pairs "
        "whose chosen response rose more, per token, than the rejected one; changes: nats per "
        "token against the base; kl: KL(base || policy) of the chosen response, nats per token. "
        "diverged: runs that the guard stopped; their last good adapters were judged.",
        "",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
