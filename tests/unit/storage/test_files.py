"""Places that are no plain files, and file systems that cannot lock."""

from __future__ import annotations

import errno
import os
import threading

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
