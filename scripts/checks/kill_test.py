"""Kills every writing command at random moments and sees that nothing is lost or damaged.

    python scripts/checks/kill_test.py                    220 SIGKILLs and 16 Ctrl-C / SIGTERM
    python scripts/checks/kill_test.py --kills 24 --signals 2 --seed 5
    python scripts/checks/kill_test.py --kills 5 --answer-with models/smollm2

A tiny model is built in a temporary folder. This process imports everything once and forks a child
for each attempt (MLX survives a fork as long as the parent has computed nothing with it; on a Mac
Metal does not, and each child is a Python of its own, which takes seconds to start). Half of
the kills come at a random moment, half right before a random one of the command's own file
operations (open for writing, rename, remove, mkdir, …). After each kill every file must be the
old or the new one; then the command runs again (`train` with --resume), must end with 0, and its
files must be those of a run that nobody killed. Exits 1 on any fault.
With --answer-with, `pairs generate` alone with this real model: a file of 8 prompts with 4 answers
of at most 24 tokens, whose writer is killed and begun again as often as --kills says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "checks"), str(ROOT / "tests" / "support")]

import kill_cases  # noqa: E402
from kill_cases import Case, digest, finished, tree  # noqa: E402

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
HEAVY = (
    "mlx_lm.convert", "mlx_lm.models.llama", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",  # where torch is, half of a start
    "fpo_mlx.cli", "fpo_mlx.judge.evaluate", "fpo_mlx.model.fuse", "fpo_mlx.pipeline.pairs_judge",
    "fpo_mlx.reference.mlx_backend", "fpo_mlx.train.trainer",
)  # fmt: skip
FORKS, CHILD = sys.platform != "darwin", "--child"  # what a child that was not forked is told
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


@dataclass
class Tally:
    """One line of the table."""

    name: str
    tried: int = 0
    survived: int = 0
    by_time: int = 0
    by_step: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What a child does: the command line, or to build the place where the others are at work.

    at: the file operation of its own before which it kills itself.
    """

    words: Sequence[str]
    stage: str
    at: int = 0
    journal: str | None = None
    only: Sequence[str] | None = None  # the cases that the place in `stage` is built for

    def work(self) -> None:
        from fpo_mlx import cache
        from fpo_mlx.cli import main

        if self.only is not None:
            kill_cases.build_place(Path(self.stage), planned(Path(self.stage), self.only))
            return
        cache.fill.__kwdefaults__["shard_pairs"] = 4  # several shards of a few pairs
        watch(Path(self.stage), self.at, Path(self.journal) if self.journal else None)
        main(list(self.words))


def planned(root: Path, only: Sequence[str]) -> list[Case]:
    return [case for case in kill_cases.cases(root) if not only or case.name in only]


def start(job: Job, log: Path) -> int:
    """Do the job in a child whose output goes to `log`; its process id."""
    if not FORKS:
        words = [sys.executable, __file__, CHILD, json.dumps(asdict(job)), str(log)]
        return os.posix_spawn(sys.executable, words, os.environ)
    if not (pid := os.fork()):
        child(job, log)
    return pid


def child(job: Job, log: Path) -> NoReturn:
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
        job.work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Exit code; a negative signal number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watch(stage: Path, at: int, journal: Path | None) -> None:
    """Count this process's changes below `stage`; write down what each file was renamed to."""
    count, inside, prefix = 0, False, str(stage)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, inside
        opens = event == "open" and (arguments[2] or 0) & WRITES
        relevant = opens or event in CHANGES
        swap = event == "ctypes.dlsym" and str(arguments[1]).startswith("rename")
        path = "" if swap or not relevant else str(arguments[0])
        if inside or not (swap or path.startswith(prefix)):
            return
        inside = True
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if journal is not None:
            with open(journal, "a") as file:
                kept = event == "os.rename" and os.path.isfile(path)
                file.write(f"{arguments[1]}\t{digest(Path(path))}\n" if kept else "step\n")
        inside = False

    sys.addaudithook(hook)


def reference_run(case: Case, scratch: Path) -> None:
    """Run the command undisturbed, and learn what its files are at any time."""
    case.reset()
    journal, log = scratch / "journal", scratch / "log"
    journal.unlink(missing_ok=True)
    if case.before is not None:
        case.known = {name: {have} for name, have in tree(case.before).items()}
        old_log = case.before / kill_cases.LOG
        case.lines = set(kill_cases.log_lines(old_log)) if old_log.is_file() else set()
    code = ended(start(Job(case.words, str(case.target.parent), journal=str(journal)), log))
    if code:
        sys.exit(f"{case.name} does not work at all (exit {code}):\n{log.read_text()[-3000:]}")
    case.wanted = tree(case.target)
    written = journal.read_text().splitlines()
    case.steps = len(written)
    for line in written:
        if line != "step":
            name, have = line.split("\t")
            case.known.setdefault(os.path.relpath(name, case.target), set()).add(have)
    case.grown = {path.name: kill_cases.log_lines(path) for path in case.target.glob("*.jsonl")}
    new_log = case.target / kill_cases.LOG
    case.lines |= set(kill_cases.log_lines(new_log)) if new_log.is_file() else set()
    case.reset()
    started = time.perf_counter()
    ended(start(Job(case.words, str(case.target.parent)), log))
    case.seconds = time.perf_counter() - started
    if tree(case.target) != case.wanted:
        sys.exit(f"{case.name}: two undisturbed runs differ, so nothing can be compared")


def kill_once(case: Case, chance: random.Random, tally: Tally, log: Path) -> None:
    """One attempt; counted when the child was still at work."""
    case.reset()
    by_step = chance.random() < 0.5
    at = chance.randint(1, case.steps) if by_step else 0
    wait = chance.uniform(0, case.seconds)
    pid = start(Job(case.words, str(case.target.parent), at=at), log)
    if not by_step:
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    if code == 0:
        return  # it was done before the kill
    tally.tried += 1
    tally.by_step += by_step
    tally.by_time += not by_step
    moment = f"before file operation {at}" if by_step else f"after {wait:.3f} s"
    faults = [] if code == -signal.SIGKILL else [f"exit {code}: {log.read_text()[-600:]}"]
    judge(case, faults, tally, moment, log)


def judge(case: Case, faults: list[str], tally: Tally, moment: str, log: Path) -> None:
    """Check what is there, run again, check the end."""
    try:
        if case.target.exists() or case.before is not None:
            faults += case.checks(case)
        words = case.again(case)
        if words is not None:
            code = ended(start(Job(words, str(case.target.parent)), log))
            if code:
                faults.append(f"the rerun ended with {code}: {log.read_text()[-600:]}")
        faults += finished(case, rerun=words is not None)
    except Exception as error:  # a file that cannot be read is a fault, not the end of the test
        faults.append(f"{type(error).__name__}: {error}")
    if faults:
        tally.faults += [f"{case.name}, {moment}: {fault}" for fault in faults]
    else:
        tally.survived += 1


def interrupt_once(
    case: Case, number: signal.Signals, chance: random.Random, tally: Tally, log: Path
) -> None:
    """Ctrl-C or SIGTERM during training: 130 or 143 after saving, and an exact resume."""
    case.reset()
    pid = start(Job(case.words, str(case.target.parent)), log)
    begun = time.perf_counter()
    while not (case.target / "run.json").exists() and time.perf_counter() - begun < 30:
        time.sleep(0.002)
    left = max(case.seconds - (time.perf_counter() - begun), 0.0)  # most of it is a slow start's
    time.sleep(chance.uniform(0, 0.5 * left))
    os.kill(pid, number)
    code = ended(pid)
    if code == 0:
        return
    tally.tried += 1
    tally.by_time += 1
    wanted = 128 + number
    faults = [] if code == wanted else [f"exit {code}, wanted {wanted}: {log.read_text()[-600:]}"]
    if not (case.target / kill_cases.STATE).is_file():
        faults.append("nothing was saved")
    case = replace(case, checks=lambda case: [])  # it saves where no undisturbed run does
    judge(case, faults, tally, number.name, log)


def preload() -> None:
    """Import once what every child would import; compute nothing."""
    from fpo_mlx import machine

    machine.set_up()
    for name in HEAVY:
        importlib.import_module(name)


def run(root: Path, kills: int, signals: int, seed: int, only: list[str]) -> list[Tally]:
    chance, log = random.Random(seed), root / "log"
    os.environ["FPO_MLX_CACHE"] = str(root / "user-cache")
    plan = planned(root, only)
    code = ended(start(Job([], str(root), only=only), log))
    if code:
        sys.exit(f"the place cannot be built:\n{log.read_text()[-3000:]}")
    tallies = []
    for i, case in enumerate(plan):
        reference_run(case, root)
        tally = Tally(case.name)
        tallies.append(tally)
        share = kills // len(plan) + (i < kills % len(plan))
        for _ in range(4 * share):
            if tally.tried < share:
                kill_once(case, chance, tally, log)
        if case.name == "train" and signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                told = Tally(f"train, {number.name}")
                tallies.append(told)
                for _ in range(2 * signals):
                    if told.tried < (signals + 1) // 2:
                        interrupt_once(case, number, chance, told, log)
    return tallies


def kill_answers(root: Path, model: str, kills: int, chance: random.Random) -> bool:
    """Whether a file whose writer was killed again and again is that of an undisturbed one."""
    prompts, log = root / "prompts.txt", root / "log"
    prompts.write_text("".join(f"Say in one sentence what the number {n} is.\n" for n in range(8)))
    ask = ["pairs", "generate", "--model", model, "--prompts", str(prompts), "--n", "4"]
    ask += ["--max-tokens", "24", "--rows", "8", "--output"]  # few rows: lines come one by one
    whole, broken = root / "whole.jsonl", root / "broken.jsonl"
    began = time.perf_counter()
    if code := ended(start(Job([*ask, str(whole)], str(root)), log)):
        sys.exit(f"it does not work at all (exit {code}):\n{log.read_text()[-3000:]}")
    seconds, there, same = time.perf_counter() - began, [], True
    while len(there) < kills or broken.exists():
        pid = start(Job([*ask, str(broken)], str(root)), log)
        if len(there) < kills:
            time.sleep(chance.uniform(0, seconds / 2))
            os.kill(pid, signal.SIGKILL)
        if code := ended(pid):
            there.append(broken.read_bytes().count(b"\n") if broken.exists() else 0)
            if code != -signal.SIGKILL:
                sys.exit(f"the rerun ended with {code}:\n{log.read_text()[-3000:]}")
        else:  # at its end: if kills are left, the next run begins a new file
            same &= broken.read_bytes() == whole.read_bytes()
            broken.unlink()
    print(
        f"pairs generate with {model}: {len(there)} kills, prompts on disk after each: "
        f"{', '.join(map(str, there))}; {whole.stat().st_size} bytes, "
        f"{'the same as' if same else 'NOT those of'} an undisturbed run"
    )
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--signals", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="name of a command; repeatable")
    parser.add_argument("--answer-with", help="folder of a real model for `pairs generate` alone")
    options = parser.parse_args()
    if FORKS:
        preload()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        root = Path(folder).resolve()
        if options.answer_with:
            model, chance = str(Path(options.answer_with).resolve()), random.Random(options.seed)
            sys.exit(not kill_answers(root, model, options.kills, chance))
        tallies = run(root, options.kills, options.signals, options.seed, options.only)
    print(
        f"{'command':<20} {'kills':>6} {'by time':>8} {'by step':>8} {'survived':>9} {'faults':>7}"
    )
    for t in tallies:
        print(
            f"{t.name:<20} {t.tried:>6} {t.by_time:>8} {t.by_step:>8} {t.survived:>9} "
            f"{len(t.faults):>7}"
        )
    tried, survived = (sum(getattr(t, n) for t in tallies) for n in ("tried", "survived"))
    seconds = time.perf_counter() - started
    print(f"survived {survived} of {tried}, seed {options.seed}, {seconds:.0f} s")
    for fault in (fault for t in tallies for fault in t.faults):
        print(f"FAULT {fault}", file=sys.stderr)
    sys.exit(survived != tried or tried < options.kills)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        from fpo_mlx import machine

        machine.set_up()
        child(Job(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    main()
