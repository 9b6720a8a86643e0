"""A few of the kills of scripts/checks/kill_test.py; the script does hundreds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import environment

pytest.importorskip("mlx.core")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "checks" / "kill_test.py"
# The harness itself: a folder that is written where it will lie.
IN_PLACE = """
from contextlib import contextmanager
from fpo_mlx.storage import files

@contextmanager
def in_place(path, check=None):
    path.mkdir(parents=True, exist_ok=True)
    yield path

files.atomic_folder = in_place
"""


def kill_test(folder: Path, *words: str, first: str = "") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the script with these words."""
    code = (
        f"{first}\n"
        "import sys, runpy\n"
        f"sys.argv = ['kill_test.py', *{words!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=folder,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_killed_commands_leave_old_or_new_files_and_their_rerun_ends_the_same(tmp_path):
    words = ["--kills", "20", "--signals", "2", "--seed", "4"]
    names = ["precompute", "train", "sae convert", "pairs generate", "pairs judge"]
    code, out, err = kill_test(tmp_path, *words, *(w for name in names for w in ("--only", name)))
    assert code == 0, out + err
    assert re.search(r"^survived 22 of 22,", out, re.MULTILINE)
    assert re.search(r"^train, SIGTERM +1 ", out, re.MULTILINE)


@pytest.mark.skipif(sys.platform == "darwin", reason="a child that is not forked is whole again")
def test_a_command_that_writes_in_place_is_caught(tmp_path):
    words = ["--kills", "8", "--signals", "0", "--only", "sae convert"]
    code, out, err = kill_test(tmp_path, *words, first=IN_PLACE)
    assert code == 1, out + err
    assert "the folder is neither old nor new" in err
