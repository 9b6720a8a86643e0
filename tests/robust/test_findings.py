"""Every kind of bad input has one plain line in `fpo-mlx check`, as a user sees it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fpo_mlx.data.check import LEVELS

SHOWN = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts/checks/findings.py"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return SHOWN["findings"](tmp_path_factory.mktemp("findings"))


def test_there_is_a_case_for_every_kind():
    assert set(SHOWN["CASES"]) == set(LEVELS)


@pytest.mark.parametrize("kind", LEVELS)
def test_its_line_says_how_grave_it_is_how_often_and_where(lines, kind):
    level, rest = lines[kind].split(None, 1)
    assert level == LEVELS[kind]
    assert rest.startswith(kind)
    count, where = rest.removeprefix(kind).split(None, 1)
    assert int(count) >= 1
    assert where.startswith("train: " if kind == "length bias" else "train.jsonl:")
    assert "Traceback" not in where
