"""A command on a terminal of 80 columns, as a person sees it; forked, see `forked`."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
from pathlib import Path

import forked

COLUMNS, LINES = 80, 40


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
