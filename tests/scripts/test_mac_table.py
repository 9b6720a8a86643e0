"""The table of what trains on which Mac is what the formulas give today."""

from __future__ import annotations

from pathlib import Path

import mac_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def test_the_table_in_the_docs_is_current():
    assert mac_table.table() in PAGE.read_text(encoding="utf-8")
