"""Ctrl-C in any command: one plain line and the exit code that shells know."""

from __future__ import annotations

from command_line import refused, run

from fpo_mlx import pipeline


def test_a_command_that_is_interrupted_says_so_and_ends_with_130(tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "cache_info", interrupt)
    done = run("cache", "info", tmp_path)
    refused(done, 130, "interrupted")
    assert done.stderr == "fpo-mlx: interrupted\n"
