"""What the scripts take from the package is there, also where they take it late."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def taken(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every `from fpo_mlx… import name` in a file, wherever it stands."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = (n for n in nodes if isinstance(n, ast.ImportFrom) and n.module)
    ours = (n for n in found if n.module.split(".")[0] == "fpo_mlx")
    return {(n.module, alias.name) for n in ours for alias in n.names}


def test_every_name_that_a_script_imports_from_the_package_is_there():
    pytest.importorskip("mlx.core")
    wanted = {one for path in sorted(SCRIPTS.rglob("*.py")) for one in taken(path)}
    assert len(wanted) > 50
    lacking = [
        f"{module}.{name}"
        for module, name in sorted(wanted)
        if not hasattr(importlib.import_module(module), name) and not find_spec(f"{module}.{name}")
    ]
    assert lacking == []
