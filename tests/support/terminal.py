"""A command on a terminal of 80 columns, as a person sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, LINES = 80, 40


def on_a_terminal(*words: str | Path) -> tuple[str, int]:
    """What a command writes, stdout and stderr in one, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [str(word) for word in words],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    return written.decode(), process.wait()
