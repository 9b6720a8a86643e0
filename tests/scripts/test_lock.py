"""The lock: hashes for all of it, within pyproject's ranges, on every supported platform."""

import re
from pathlib import Path

import lock
import pytest
from lock_platforms import PLATFORMS, PYTHONS, chosen, entries, environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = lock.LOCK.read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MACHINES = [(platform, python) for platform in PLATFORMS for python in PYTHONS]


def wanted(extra: str = "dev") -> list[Requirement]:
    """The project's requirements as pyproject.toml has them, those of one extra with them."""
    import tomllib

    project = tomllib.loads(PYPROJECT)["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"][extra]]
    return [Requirement(text) for text in (*texts, *lock.BUILD)]


def test_every_entry_has_one_version_and_hashes_and_comes_from_no_particular_place():
    found = entries(TEXT)
    assert len(found) > 60
    for requirement, hashes in found:
        assert re.fullmatch(r"==[^,]+", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)
    assert not re.search(r"file:|https?:|--(extra-)?index|--find-links|(^|\s)/\w", TEXT)


@pytest.mark.parametrize(("platform", "python"), MACHINES)
def test_the_lock_lies_within_the_ranges_of_pyproject(platform, python):
    names = [canonicalize_name(requirement.name) for requirement, _ in entries(TEXT)]
    locked = {canonicalize_name(r.name): r for r, _ in chosen(TEXT, platform, python)}
    assert len(locked) == len(chosen(TEXT, platform, python)), "two versions of one package"
    assert set(locked) <= set(names)
    where = environment(platform, python)
    for requirement in wanted():
        if requirement.marker is None or requirement.marker.evaluate(where):
            version = str(locked[canonicalize_name(requirement.name)].specifier)[2:]
            assert requirement.specifier.contains(version), f"make lock: {requirement}"


@pytest.mark.parametrize("python", PYTHONS)
def test_mlx_comes_with_the_part_that_its_platform_computes_with(python):
    parts = {p: {r.name for r, _ in chosen(TEXT, p, python)} for p in PLATFORMS}
    assert {"mlx", "mlx-metal"} <= parts["macos-arm64"]
    for linux in ("linux-x86_64", "linux-aarch64"):
        assert {"mlx", "mlx-cpu"} <= parts[linux]
        assert "mlx-metal" not in parts[linux]


def test_the_supported_pythons_begin_where_pyproject_does():
    assert f'requires-python = ">={PYTHONS[0]}"' in PYPROJECT
    assert PYTHONS[0] == lock.OLDEST_PYTHON
    minor = PYTHONS[0].split(".")[1]
    assert f"< (3, {minor})" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_an_update_says_what_became_of_each_package():
    old = "a==1 \\\n    --hash=sha256:00\nb==1 ; python_version < '3.12'\nb==2\nc==1\n"
    new = "a==1 \\\n    --hash=sha256:11\nb==2\nd==5\nc==1\n"
    said = ["a 1: other hashes or markers", "b 1, 2 -> 2", "d (new) -> 5"]
    assert lock.changes(old, new) == said
    assert lock.changes(new, new) == []
    marked = new.replace("c==1", "c==1 ; python_version < '3.13'")
    assert lock.changes(new, marked) == ["c 1: other hashes or markers"]
    fewer = new.replace("d==5\n", "")
    assert lock.changes(new, fewer) == ["d 5 -> (gone)"]


def test_the_newest_run_lifts_every_upper_bound_and_no_other():
    lifted = {Requirement(text).name for text in lock.unbounded(PYPROJECT)}
    bounded = {r.name for r in wanted() if any(s.operator == "<" for s in r.specifier)}
    assert lifted == bounded == {"mlx", "mlx-lm", "transformers"}
    assert all(
        [s.operator for s in Requirement(text).specifier] == [">="]
        for text in lock.unbounded(PYPROJECT)
    )


def test_the_newest_run_asks_for_one_backend_of_mlx_alone():
    """An override holds for every `mlx`: two backends in one environment overwrite each other."""
    extras = {e for text in lock.unbounded(PYPROJECT) for e in Requirement(text).extras}
    assert extras <= {"cpu"}
