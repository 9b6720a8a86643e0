"""A command on a terminal of 80 columns, as a person sees it; forked, see `forked`."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
from collections.abc import Mapping
from pathlib import Path

import forked

COLUMNS, LINES = 80, 40


def when_it_closes(code: str, environment: Mapping[str, str], *, after: str) -> int | None:
    """The exit code of Python with this code when its terminal closes after this was written.

    The terminal is the process's own, as in a window of its own.
    """
    ours, theirs = pty.openpty()
    own = "import fcntl, os, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    process = forked.start_at(os.ttyname(theirs), ["-c", f"{own}\n{code}"], environment)
    written = ""
    while after not in written:
        assert ours in select.select([ours, process.sentinel], [], [])[0], written
        written += os.read(ours, 65536).decode(errors="replace")
    os.close(theirs)
    os.close(ours)  # what a window does: the system tells the process by SIGHUP
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running without its terminal: {written[-500:]}")
    return process.exitcode


def on_a_terminal(*words: str | Path) -> tuple[str, int | None]:
    """What Python with these words writes, stdout and stderr in one, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    process = forked.start_at(os.ttyname(theirs), words, environment)
    written = b""
    while ours in select.select([ours, process.sentinel], [], [])[0]:
        written += os.read(ours, 65536)
    process.join()
    os.close(theirs)
    os.close(ours)
    return written.decode(), process.exitcode
