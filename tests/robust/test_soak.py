"""The judge of scripts/checks/soak.py by hand; the soak itself is the script's."""

from __future__ import annotations

import runpy
from pathlib import Path

SOAK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "checks" / "soak.py"))
Sample, judge = SOAK["Sample"], SOAK["judge"]


def samples(resident=lambda n: 100.0, files=lambda n: 9):
    return [Sample(resident(n), 5.0, 1.0, 8.0, files(n), float(n)) for n in range(40)]


def test_what_is_flat_after_warm_up_passes():
    assert judge(samples(lambda n: 100.0 if n > 9 else 40.0 + n), 2.0) == []


def test_steady_growth_is_told_with_its_size():
    """Quarter means 114.5 and 134.5: 17.47 percent."""
    found = judge(samples(lambda n: 100.0 + n), 2.0)
    assert found == ["resident memory grew by 17.47 %, over 2 %"]
    assert judge(samples(lambda n: 100.0 + n), 18.0) == []


def test_a_file_left_open_is_told():
    assert judge(samples(files=lambda n: 9 + (n > 35)), 2.0) == ["open files went from 9 to 10"]
