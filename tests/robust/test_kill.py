"""A few of the kills of scripts/checks/kill_test.py; the script does hundreds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "checks" / "kill_test.py"


def test_killed_commands_leave_old_or_new_files_and_their_rerun_ends_the_same():
    words = ["--kills", "6", "--signals", "2", "--seed", "4"]
    words += ["--only", "precompute", "--only", "train", "--only", "sae convert"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^survived (\d+) of \1,", done.stdout, re.MULTILINE)
    assert re.search(r"^train, SIGTERM +1 ", done.stdout, re.MULTILINE)


def test_answers_and_verdicts_that_are_killed_go_on_to_the_same_file():
    words = ["--kills", "8", "--signals", "0", "--seed", "1"]
    words += ["--only", "pairs generate", "--only", "pairs judge"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived 8 of 8" in done.stdout


def test_a_command_that_writes_in_place_is_caught(tmp_path):
    """The harness itself: without the name swap it must find faults."""
    broken = (
        "import sys, runpy\n"
        "from contextlib import contextmanager\n"
        "from fpo_mlx.storage import files\n"
        "@contextmanager\n"
        "def in_place(path, check=None):\n"
        "    path.mkdir(parents=True, exist_ok=True)\n"
        "    yield path\n"
        "files.atomic_folder = in_place\n"
        f"sys.argv = ['kill_test.py', '--kills', '8', '--signals', '0', '--only', 'sae convert']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the folder is neither old nor new" in done.stderr
