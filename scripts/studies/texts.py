"""Shared by the scripts on feature control: preference pairs, and what a bullet list is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)


def is_list(text: str) -> bool:
    """Two or more lines that begin with a bullet or a number."""
    return len(ITEM.findall(text)) >= 2


def rows(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def shared(*parts: str) -> Path:
    """A place in the folder `shared` beside the checkout, where there is one."""
    return ROOT.parent.joinpath("shared", *parts)
