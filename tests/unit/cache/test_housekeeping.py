"""`cache list` and `cache prune`: what is listed, what goes, and what is never touched."""

from __future__ import annotations

import json
import os
import re
import time

import numpy as np
import pytest
from click.testing import CliRunner

from fpo_mlx import cache as rc
from fpo_mlx.cli import main
from fpo_mlx.errors import FpoError
from fpo_mlx.pipeline import doctor
from fpo_mlx.records import ResponseScore, SparseFeatures
from fpo_mlx.storage import locks


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def make(folder, model: str, rows: int = 2, days: float = 0.0):
    identity = rc.CacheIdentity(model, "t", saes=(("s", "resid_post of block 1"),))
    pooled = SparseFeatures(np.array([1], np.int32), np.array([0.5], np.float32))
    store = rc.open_cache(folder, identity, create=True)
    store.append([(bytes([n] * 16), ResponseScore(-2.0, 3, (pooled,))) for n in range(rows)])
    for path in folder.iterdir():
        os.utime(path, (time.time() - days * 86400,) * 2)
    return store


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path))
    folder = tmp_path / "reference"
    make(folder / "old", "aaaa1", days=40)
    make(folder / "new", "bbbb222", rows=200, days=1)
    (folder / "notes").mkdir()
    (folder / "notes" / "manifest.json").write_text('{"mine": true}')
    (folder / "link").symlink_to(folder / "old")
    return folder


def test_listing_shows_caches_only_the_oldest_first(root, tmp_path):
    done = run("cache", "list", "--json", tmp_path / "l.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "l.json").read_text())
    assert [os.path.basename(row["folder"]) for row in rows] == ["old", "new"]
    sizes = [sum(p.stat().st_size for p in (root / name).iterdir()) for name in ("old", "new")]
    assert [row["bytes"] for row in rows] == sizes
    assert [round(row["days"]) for row in rows] == [40, 1]
    assert "caches: 2" in done.stdout
    assert "link" not in done.stdout


def test_pruning_needs_a_condition(root):
    done = run("cache", "prune")
    assert done.exit_code == 2
    assert "--older-than" in done.stderr


@pytest.mark.parametrize(
    ("words", "gone"),
    [(["--older-than", 30], ["old"]), (["--older-than", 0], ["old", "new"]),
     (["--larger-than", 0.005], ["new"]), (["--model", "bbbb22"], ["new"]),
     (["--older-than", 30, "--model", "bbbb22"], [])],
)  # fmt: skip
def test_every_condition_given_must_hold(root, words, gone):
    assert run("cache", "prune", *words, "--yes").exit_code == 0
    assert sorted({"old", "new"} - {p.name for p in root.iterdir()}) == sorted(gone)
    assert (root / "notes" / "manifest.json").read_text() == '{"mine": true}'


@pytest.mark.parametrize(
    ("model", "said"),
    [("", "is empty"), (" ", "is empty"), ("b", "found no such model"),
     ("./modle", "found no such model"), ("mlx-community/gone-4bit", "found no such model")],
)  # fmt: skip
def test_what_names_no_model_removes_nothing_and_is_refused(root, model, said):
    """`--model "$M"` with nothing in M named every cache."""
    done = run("cache", "prune", "--model", model, "--yes")
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(rc.list_caches(root)) == 2


def test_a_model_of_the_hubs_cache_is_known_by_its_id(root, tmp_path, monkeypatch):
    from fpo_mlx.pipeline import caches

    monkeypatch.setattr(caches, "at_hand", lambda spec: tmp_path if spec == "owner/model" else None)
    monkeypatch.setattr(caches, "has_weights", lambda folder: True)
    monkeypatch.setattr(caches.weights, "model_fingerprint", lambda folder: "bbbb222")
    assert run("cache", "prune", "--model", "owner/model", "--yes").exit_code == 0
    assert [entry.folder.name for entry in rc.list_caches(root)] == ["old"]


def test_a_cache_that_a_run_reads_counts_as_new_from_then_on(root):
    store = rc.open_cache(root / "old", rc.read_identity(root / "old"))
    store.mark_used()
    assert [round(entry.days) for entry in rc.list_caches(root)] == [1, 0]


def test_a_shard_that_goes_while_it_is_in_use_is_told_in_words(root):
    store = rc.open_cache(root / "old", rc.read_identity(root / "old"))
    rc.remove(root / "old")
    with pytest.raises(FpoError, match="removed while it was in use. Run the command again"):
        store.get(store.keys()[0])


def test_so_it_is_when_it_was_read_before_and_is_not_open_any_more(root):
    store = rc.open_cache(root / "old", rc.read_identity(root / "old"))
    store.get(store.keys()[0])
    store._files.close()  # as the sixteen that were read last close it
    rc.remove(root / "old")
    with pytest.raises(FpoError, match="removed while it was in use"):
        store.get(store.keys()[0])


def test_it_asks_and_a_dry_run_removes_nothing(root):
    shown = run("cache", "prune", "--older-than", 0, "--dry-run")
    assert re.search(r"^caches that would be removed: 2", shown.stdout, re.MULTILINE)
    no = CliRunner().invoke(main, ["cache", "prune", "--older-than", "0"], input="n\n")
    assert no.exit_code == 1
    assert len(rc.list_caches(root)) == 2
    yes = CliRunner().invoke(main, ["cache", "prune", "--older-than", "0"], input="y\n")
    assert yes.exit_code == 0, yes.output
    assert rc.list_caches(root) == []


def test_a_cache_that_is_written_is_left_alone(root):
    with locks.held(root / "old" / "writer.lock", root / "old"):
        assert "pid" in run("cache", "list").stdout
        assert run("cache", "prune", "--older-than", 0, "--yes").exit_code == 0
        with pytest.raises(FpoError, match="being written by pid"):
            rc.remove(root / "old")
    assert [entry.folder.name for entry in rc.list_caches(root)] == ["old"]
    part = root / "old" / "parts" / "000-of-002"
    part.mkdir(parents=True)
    with locks.held(part / "writer.lock", part), pytest.raises(FpoError, match="parts is being"):
        rc.remove(root / "old")
    assert len(rc.open_cache(root / "old", rc.read_identity(root / "old"))) == 2


def test_other_files_in_a_caches_folder_stay(root):
    (root / "old" / "thoughts.txt").write_text("mine")
    assert rc.remove(root / "old") > 0
    assert [p.name for p in (root / "old").iterdir()] == ["thoughts.txt"]


def test_what_is_no_cache_is_not_removed(root):
    with pytest.raises(FpoError, match="cannot be read as the manifest"):
        rc.remove(root / "notes")
    assert (root / "notes" / "manifest.json").exists()


def test_the_doctor_counts_the_caches(root):
    finding = doctor.reference_caches()
    assert finding.text.startswith("2, 0.00 GB, the oldest 40 days old")
