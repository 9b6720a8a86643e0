"""Processes forked from one that has imported everything, so that a start costs no imports.

Each is a process of its own, with its own environment, exit code and signals. What it is forked
from has computed nothing with MLX, which survives a fork only then; the process of the tests has.
Where the start itself, or what it imports, is under test, start a Python.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

FORKS = sys.platform.startswith("linux")  # on a Mac Metal does not survive it: a Python each
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
CONTEXT.set_forkserver_preload(["forked_imports"])
# what libraries read when they are imported
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Forked:
    """One that was started, and the files of its stdout and stderr."""

    process: BaseProcess
    out: Path
    err: Path

    def end(self, timeout: float) -> tuple[int | None, str, str]:
        """(exit code, or less the signal; stdout; stderr); killed if it has not ended by then."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.err.read_text()}")
        return self.process.exitcode, self.out.read_text(), self.err.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def start(words: Sequence[object], folder: Path, environment: Mapping[str, str]) -> Forked:
    """Python with these words (-c CODE … or -m MODULE …); stdin is empty, outputs in `folder`."""
    out, err = folder / "stdout", folder / "stderr"
    folder.mkdir(parents=True, exist_ok=True)
    return Forked(_started(words, environment, os.devnull, out, err), out, err)


def start_at(terminal: str, words: Sequence[object], environment: Mapping[str, str]) -> BaseProcess:
    """The same at a terminal, such as /dev/pts/3."""
    return _started(words, environment, terminal, terminal, terminal)


def _started(
    words: Sequence[object], environment: Mapping[str, str], *files: str | Path
) -> BaseProcess:
    plain = [str(word) for word in words]
    process = CONTEXT.Process(
        target=_run, args=(plain, dict(environment), [str(file) for file in files])
    )
    if FORKS:
        with mock.patch.dict(os.environ, {**QUIET, "PYTHONPATH": os.pathsep.join(sys.path)}):
            forkserver.ensure_running()  # it looks for what it imports by PYTHONPATH alone
    process.start()
    return process


def _run(words: list[str], environment: dict[str, str], files: list[str]) -> None:
    for number, name in enumerate(files):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    kind, what, *rest = words
    sys.argv = [kind, *rest]
    if kind == "-c":
        exec(compile(what, "<forked>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
