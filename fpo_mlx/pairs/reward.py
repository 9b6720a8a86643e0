"""A reward function of the user's own, run in a process of its own with limits."""

from __future__ import annotations

import json
import math
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs import example_rewards, reward_child
from fpo_mlx.pairs.records import LARGEST
from fpo_mlx.storage.files import sha256_of

EXAMPLES = ("brevity", "plainness")
OWNERS = "of `pairs judge` or `compare` sets it"  # the limits; a file of rounds has the former's
_FULL = re.compile("memory|failed to map|allocat", re.IGNORECASE)  # an error for want of it
STARTS = 60.0  # seconds that the file may take to import, or more by the limit of a call


def locate(spec: str) -> tuple[Path, str]:
    """The file and the function that --reward names. Raises: ConfigError."""
    if spec in EXAMPLES:
        return Path(example_rewards.__file__), spec
    path, _, name = spec.rpartition(":")
    if not path or not name.isidentifier():
        raise ConfigError(
            f"--reward {spec}: wanted FILE.py:FUNCTION, or an example: {', '.join(EXAMPLES)}."
        )
    if not Path(path).is_file():
        raise ConfigError(f"--reward {spec}: there is no file {path}.")
    return Path(path), name


def judge_name(spec: str) -> str:
    """The name in verdicts: it changes when the file does."""
    path, name = locate(spec)
    return f"reward:{name}@{sha256_of(path)[:8]}"


class Reward:
    """The function in its process. Use as a context manager."""

    def __init__(self, spec: str, *, timeout: float, memory_gb: float) -> None:
        self._spec, self._timeout, self._memory = spec, timeout, memory_gb
        self._path, self._name = locate(spec)
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Reward:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def scores(self, prompt: str, answers: Sequence[str], where: str) -> list[float]:
        """One finite number per answer.

        Raises: DataError naming the row when the function raises, gives something else, takes
        longer than the time limit or more than its memory.
        """
        request = json.dumps({"prompt": prompt, "answers": list(answers)}).encode() + b"\n"
        reply = self._ask(request, self._timeout, where)
        if "error" in reply:
            why = self._why(reply["error"])
            raise DataError(f"{where}: --reward {self._spec} raised {why}.")
        found = reply.get("scores")
        if not isinstance(found, list) or len(found) != len(answers):
            shape = len(found) if isinstance(found, list) else type(found).__name__
            raise DataError(
                f"{where}: --reward {self._spec} gave {shape} scores, wanted {len(answers)}."
            )
        for number, score in enumerate(found):
            fits = isinstance(score, int | float) and abs(score) <= LARGEST
            if not fits or not math.isfinite(score):
                raise DataError(
                    f"{where}, candidate {number}: --reward {self._spec} gave {score}, wanted a "
                    f"finite number of at most {LARGEST:g}."
                )
        return [float(score) for score in found]

    def _start(self) -> None:
        command = [sys.executable, reward_child.__file__, str(self._path), self._name]
        own = dict(os.environ)
        # macOS forks, and tokenizers warns of a fork unless it is told; the child is as it was
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self._process = subprocess.Popen(
            [*command, str(self._memory * 1e9)], env=own, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            reply = self._ask(b"", max(STARTS, self._timeout), "at its start")
        except DataError as error:
            self._stop()
            raise ConfigError(str(error)) from error
        except BaseException:  # Ctrl-C, which the process heeds not
            self._stop()
            raise
        if "error" in reply:
            self._stop()
            why = self._why(reply["error"])
            raise ConfigError(f"--reward {self._spec}: the file gives {why}.")

    def _why(self, error: str) -> str:
        return f"{error} ({self._bound()})" if _FULL.search(error) else error

    def _bound(self) -> str:
        return f"it may use {self._memory:g} GB; --memory-gb {OWNERS}"

    def _ask(self, request: bytes, timeout: float, where: str) -> dict:
        """The next line of the process. A thread-free write: it reads before it answers."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise DataError(f"{where}: --reward {self._spec} has ended.")
        until = time.monotonic() + timeout
        try:
            process.stdin.write(request)
            process.stdin.flush()
            while b"\n" not in self._buffer:
                left = until - time.monotonic()
                if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                    self._stop()
                    raise DataError(
                        f"{where}: --reward {self._spec} took longer than {timeout:g} seconds; "
                        f"--timeout {OWNERS}."
                    )
                read = os.read(process.stdout.fileno(), 1 << 16)
                if not read:
                    raise BrokenPipeError
                self._buffer += read
        except BrokenPipeError:
            self._stop()
            raise DataError(
                f"{where}: the process of --reward {self._spec} ended (exit code "
                f"{process.returncode}). Too much memory ends it, too: {self._bound()}."
            ) from None
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def _stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            for pipe in (process.stdin, process.stdout):
                try:
                    if pipe:
                        pipe.close()
                except OSError:
                    pass
            process.kill()
            process.wait()
