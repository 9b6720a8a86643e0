"""Places that are no plain files, and file systems that cannot lock."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from fpo_mlx.errors import FpoError
from fpo_mlx.storage import files, locks


def test_of_a_link_the_target_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.json").write_text("1")
    for name in ("a.json", "new.json"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
        files.write_json(tmp_path / name, 2)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "far" / name).read_text() == "2\n"
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["a.json", "new.json"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    """As `--json >(jq .)` gives one, or `--json /dev/stdout`."""
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write_json(tmp_path / "pipe", {"a": 1})
    reader.join(10)
    assert got == [files.json_text({"a": 1})]
    assert (tmp_path / "pipe").is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("code", locks.NO_LOCKS)
def test_a_file_system_without_locks_is_named_as_the_trouble(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with (
        pytest.raises(FpoError, match=r"cache cannot be locked .* no locks .* local disk"),
        locks.held(tmp_path / "lock", tmp_path / "cache"),
    ):
        pass
    assert locks.owner(tmp_path / "lock") is None


def test_any_other_trouble_with_a_lock_stays_what_it_is(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken disk"), locks.held(tmp_path / "l", tmp_path):
        pass


@pytest.mark.parametrize("taken", [False, True])
def test_a_lock_whose_file_went_before_it_was_locked_is_taken_anew(tmp_path, monkeypatch, taken):
    """Its owner let go between our open and our lock; another may have made a new file by then."""
    path, real, calls = tmp_path / "lock", locks.fcntl.flock, []

    def flock(handle, how):
        if not calls:
            path.unlink()
            if taken:
                path.write_text("another's")
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    handle = locks.acquire(path, tmp_path)
    try:
        assert len(calls) == 2
        assert os.fstat(handle).st_ino == path.stat().st_ino
        with pytest.raises(FpoError, match=f"being written by pid {os.getpid()}"):
            locks.acquire(path, tmp_path)
    finally:
        locks.release(path, handle)


def test_what_is_put_into_a_folder_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path, monkeypatch
):
    """A power cut after the rename would leave empty files under a good name."""
    synced, real, target = [], files.flush, tmp_path / "model"

    def flush(handle):
        synced.append((os.fstat(handle).st_ino, target.exists()))
        real(handle)

    monkeypatch.setattr(files, "flush", flush)
    with files.atomic_folder(target) as work:
        (work / "below").mkdir()
        (work / "below" / "a.txt").write_text("a")
    for path in (target, target / "below", target / "below" / "a.txt"):
        assert (path.stat().st_ino, False) in synced
    assert (tmp_path.stat().st_ino, True) in synced


@pytest.fixture
def no_swap(monkeypatch):
    """A disk that cannot exchange two names, as exFAT and network disks."""
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)


def older(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def test_a_folder_that_could_not_be_replaced_is_back_under_its_name(tmp_path, monkeypatch, no_swap):
    folder, real = older(tmp_path), os.replace

    def failing(source, target):
        if Path(target) == folder and ".old" not in Path(source).name:
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with (
        pytest.raises(FpoError, match="What was there is untouched"),
        files.atomic_folder(folder) as work,
    ):
        (work / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_a_killed_writer_had_moved_aside_comes_back(tmp_path):
    """Killed between the two renames, both are there under its temporary names."""
    folder = older(tmp_path)
    folder.rename(tmp_path / ".tmp-999999.old-model")
    (tmp_path / ".tmp-999999-model").mkdir()
    with pytest.raises(RuntimeError), files.atomic_folder(folder):
        raise RuntimeError
    assert (folder / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_of_a_name_that_ends_alike_is_left_alone(tmp_path):
    (tmp_path / ".tmp-999999-my-model").mkdir()
    (tmp_path / ".tmp-999999.old-my-model").mkdir()
    files.sweep(tmp_path, "model")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("writing", "beside"), [("model", "model.old"), ("model.old", "model")])
def test_the_work_folder_of_a_writer_beside_it_is_left_alone(tmp_path, writing, beside):
    with files.atomic_folder(tmp_path / beside) as work:
        (work / "config.json").write_text("beside")
        with files.atomic_folder(tmp_path / writing) as other:
            (other / "config.json").write_text("own")
        assert (work / "config.json").read_text() == "beside"


def test_a_folder_moved_aside_is_no_work_folder_of_a_name_that_ends_alike(
    tmp_path, monkeypatch, no_swap
):
    """Between the two renames another process writes `model.old`; then the disk is full."""
    folder, real = older(tmp_path), os.replace

    def failing(source, target):
        if Path(target) == folder and ".old" not in Path(source).name:
            files.sweep(tmp_path, "model.old")
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(FpoError, match="untouched"), files.atomic_folder(folder) as work:
        (work / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "old"


def test_what_is_left_of_an_old_folder_whose_place_was_taken_does_not_come_back(tmp_path):
    older(tmp_path).rename(tmp_path / ".tmp-999999.old-model")
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "model"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
