"""Ctrl-C in any command: one plain line and the exit code that shells know."""

from __future__ import annotations

import io
import signal
import sys

from command_line import refused, run

from fpo_mlx import pipeline
from fpo_mlx.cli.show import say
from fpo_mlx.cli.train import on_signal_within


def test_a_command_that_is_interrupted_says_so_and_ends_with_130(tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "cache_info", interrupt)
    done = run("cache", "info", tmp_path)
    refused(done, 130, "interrupted")
    assert done.stderr == "fpo-mlx: interrupted\n"


def test_a_signal_amid_a_line_stops_after_the_update_and_ends_nothing_else(monkeypatch):
    """The handler's own line was an error of the buffer, which ended the run with nothing saved."""

    class Raised(io.RawIOBase):
        written = b""

        def writable(self):
            return True

        def write(self, data):
            if not self.written:
                signal.raise_signal(signal.SIGTERM)
            self.written += bytes(data)
            return len(data)

    raw = Raised()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(raw)))
    with on_signal_within() as install:
        stop = install()
        say("3  loss 0.5")
        assert stop() == 128 + signal.SIGTERM
    assert b"3  loss 0.5" in raw.written
