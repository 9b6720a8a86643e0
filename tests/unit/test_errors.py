"""What an error says to do next can be typed as it stands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from fpo_mlx.errors import pip_install

PACKAGE = Path(__file__).resolve().parents[2] / "fpo_mlx"


def test_what_to_install_is_installed_for_this_python_whatever_a_shell_calls_pip(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/Users/a b/.venv/bin/python")
    said = pip_install("mlx[cpu]", "mlx-lm>=0.32,<0.33")
    assert said == "'/Users/a b/.venv/bin/python' -m pip install 'mlx[cpu]' 'mlx-lm>=0.32,<0.33'"
    assert shlex.split(said)[4:] == ["mlx[cpu]", "mlx-lm>=0.32,<0.33"]


def test_no_message_says_pip_alone_but_for_a_new_environment():
    """Homebrew's pip refuses, and without an activated environment there may be none."""
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = [
        (path.name, line.strip())
        for path, text in texts.items()
        for line in text.splitlines()
        if "pip install " in line
        and "a new environment with" not in line
        and "in the clone" not in line
    ]
    assert found == []
