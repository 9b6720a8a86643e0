"""Feeds spoiled files to every reader: only the documented errors may come out.

    python scripts/checks/fuzz.py                     120,000 inputs
    python scripts/checks/fuzz.py --inputs 5000 --seed 7 --only rows

Two sources: valid inputs with nodes or bytes changed (seeded), and for rows, settings and the
cache manifest values made up by hypothesis. A fault is any exception but FpoError, more than
5 processor seconds for one input (a busy machine or disk is no fault of a reader), or an
allocation of more than 512 MB. Exits 1 on any fault.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "checks"), str(ROOT / "tests" / "support")]

from fuzz_inputs import Target, targets  # noqa: E402

from fpo_mlx.errors import FpoError  # noqa: E402

SECONDS, MEGABYTES = 5, 512


class Hang(BaseException):
    """One input took too long."""


class Book:
    """Counts, and one example of each kind of fault."""

    def __init__(self) -> None:
        self.read: collections.Counter = collections.Counter()
        self.refused: collections.Counter = collections.Counter()
        self.faults: collections.Counter = collections.Counter()
        self.examples: dict[str, str] = {}

    def attempt(self, name: str, call: Callable[[], Any]) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 60 * SECONDS)  # it waits for something
        try:
            call()
            self.read[name] += 1
        except FpoError as error:
            str(error).encode("utf-8", "backslashreplace")
            self.refused[name] += 1
        except (Exception, Hang) as error:
            self._fault(name, error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _fault(self, name: str, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/fpo_mlx/" in f.filename] or list(frames)
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        key = f"{name}: {type(error).__name__} at {place}"
        self.faults[key] += 1
        self.examples.setdefault(key, str(error)[:200])


def alarm(number: int, frame: Any) -> None:
    raise Hang(f"more than {SECONDS} processor seconds, or {60 * SECONDS} of waiting")


def limit_memory() -> None:
    """A larger allocation becomes a MemoryError (Linux; elsewhere there is no such limit)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEGABYTES * 2**20,) * 2)


def mutate(every: list[Target], inputs: int, seed: int, book: Book) -> None:
    total = sum(target.share for target in every)
    for target in every:
        chance = random.Random(f"{seed} {target.name}")
        for _ in range(round(inputs * target.share / total)):
            book.attempt(target.name, target.make(chance))


def invent(root: Path, inputs: int, seed: int, book: Book) -> None:
    """Values that hypothesis makes up."""
    import hypothesis
    from hypothesis import strategies as st

    from fpo_mlx import cache
    from fpo_mlx.config import load_config, options
    from fpo_mlx.data.rows import parse_row

    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    names = st.sampled_from(["role", "content", "tool_calls", "a"])
    value = st.recursive(
        leaf,
        lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3),
        max_leaves=8,
    )
    row = st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected", "system", "tools"]), value, max_size=5
    )
    setting = st.dictionaries(st.sampled_from([*options(), "objective"]), value, max_size=4)
    fields = ["format", "version", "identity", "digest", "model", "saes", "tokenizer", "adapter"]
    manifest = st.dictionaries(st.sampled_from(fields), value, max_size=5)
    folder = root / "invented"
    folder.mkdir()

    def of_manifest(made: Any) -> None:
        (folder / "manifest.json").write_text(json.dumps(made))
        cache.read_identity(folder)

    def of_settings(made: Any) -> None:
        json.dumps(load_config(made).as_dict())

    plans = (("rows (invented)", row, parse_row), ("settings (invented)", setting, of_settings),
             ("manifest (invented)", manifest, of_manifest))  # fmt: skip
    for name, strategy, use in plans:
        one = _attempting(book, name, use)
        quiet = hypothesis.settings(
            max_examples=max(inputs // len(plans), 1), database=None, deadline=None,
            phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        hypothesis.seed(seed)(quiet(hypothesis.given(strategy)(one)))()


def _attempting(book: Book, name: str, use: Callable[[Any], Any]) -> Callable:
    def one(made: Any) -> None:
        book.attempt(name, lambda: use(made))

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="name of a reader; repeatable")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, alarm)
    book, started = Book(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder)
        every = [t for t in targets(root) if not chosen.only or t.name in chosen.only]
        limit_memory()
        part = 0 if chosen.only else chosen.inputs // 20
        mutate(every, chosen.inputs - part, chosen.seed, book)
        if part:
            invent(root, part, chosen.seed, book)
    print(f"{'reader':<22} {'inputs':>8} {'read':>8} {'refused':>8} {'faults':>7}")
    for name in dict.fromkeys([*book.read, *book.refused, *(k.split(":")[0] for k in book.faults)]):
        bad = sum(n for key, n in book.faults.items() if key.startswith(f"{name}: "))
        counts = (book.read[name], book.refused[name], bad)
        print(f"{name:<22} {sum(counts):>8} " + f"{counts[0]:>8} {counts[1]:>8} {counts[2]:>7}")
    total = sum(sum(c.values()) for c in (book.read, book.refused, book.faults))
    seconds = time.perf_counter() - started
    print(f"{total} inputs, {book.faults.total()} faults, seed {chosen.seed}, {seconds:.0f} s")
    for key, n in book.faults.most_common():
        print(f"FAULT {n:>6} x {key}: {book.examples[key]}")
    sys.exit(bool(book.faults) or total < 0.95 * chosen.inputs)


if __name__ == "__main__":
    main()
