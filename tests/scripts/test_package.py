"""What is built holds all that the clone's package holds, and says of itself what is true."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import package
import pytest

import fpo_mlx

ROOT = package.ROOT
NEEDED = ("LICENSE", "README.md", "pyproject.toml")
BUILD = "from setuptools import build_meta as b; print(b.{kind}(r'{out}'))"


def build(source: Path, out: Path, kind: str) -> Path:
    """By the backend that pyproject.toml names, without an environment and an index."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=f"build_{kind}", out=out)],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the clone's files, sdist, wheel made of the unpacked sdist)."""
    root = tmp_path_factory.mktemp("package")
    source = package.copy_of_checkout(root / "source")
    sdist = build(source, root / "dist", "sdist")
    with tarfile.open(sdist) as archive:
        # Python 3.11.2, which Debian 12 has, knows no filters; later ones want one named
        how = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(root / "unpacked", **how)
    (unpacked,) = (root / "unpacked").iterdir()
    return source, sdist, build(unpacked, root / "dist", "wheel")


def test_the_wheel_of_the_sdist_holds_every_file_of_the_package_and_nothing_else(built):
    source, _, wheel = built
    ours = {str(path.relative_to(source)) for path in (source / "fpo_mlx").rglob("*.*")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in ours if (source / name).is_file()}
    assert {"fpo_mlx/py.typed", "fpo_mlx/report/report.html", "fpo_mlx/sae/table.json"} <= names
    assert "fpo_mlx/demo/sae/sae_weights.safetensors" in names


def test_the_sdist_has_what_a_packager_looks_for_and_no_half_of_the_tests(built):
    _, sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*NEEDED, "CITATION.cff", "CHANGELOG.md", "SECURITY.md"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_its_metadata_name_the_version_the_licence_and_the_command(built):
    _, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        told = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert told["Version"] == fpo_mlx.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.11"
    assert "fpo-mlx = fpo_mlx.cli:main" in points


def test_the_citation_names_this_version_and_the_paper():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(fpo_mlx.__version__)}$", text, re.M)
    assert "2411.07618" in text
