"""What the Makefile does on a Mac, as far as another machine can tell."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Makefile").read_text(encoding="utf-8")
CHECK = re.sub(
    r"\\\n\s*", "", re.findall(r"^CHECK = -c '(.*?)'$", TEXT, re.MULTILINE | re.DOTALL)[0]
)


@pytest.mark.parametrize(
    ("system", "machine", "macos", "said"),
    [
        ("linux", "x86_64", "", None),
        ("darwin", "arm64", "14.0", None),
        ("darwin", "arm64", "26.1", None),
        ("darwin", "arm64", "13.7.8", "macOS 14 or newer is needed, found 13.7.8"),
        ("darwin", "x86_64", "15.1", "arch -arm64"),
    ],
)
def test_a_mac_that_mlx_has_no_build_for_is_told_before_anything_is_installed(
    monkeypatch, system, machine, macos, said
):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    with pytest.raises(SystemExit) as ended:
        exec(CHECK, {})
    assert (said in ended.value.code) if said else not ended.value.code


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_what_icloud_hides_of_an_installation_is_shown_again_and_the_demo_needs_it_not(tmp_path):
    """site.py skips a hidden .pth file, and an editable install is one."""
    told = tmp_path / "told"
    for name in ("python", "chflags"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >>"{told}"\n[ {name} = python ]\n')
        tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["make", f"BIN={tmp_path}", f"PYTHON={tmp_path}/python", "demo"],
        cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = told.read_text().splitlines()
    assert "-e ." in lines[-3]
    assert lines[-2:] == ["chflags -R nohidden .venv", "python -m fpo_mlx demo"]
