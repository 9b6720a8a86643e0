"""Files of lines that only grow, whatever killed their writer."""

from __future__ import annotations

import errno
import json
import os
import time

import pytest

from fpo_mlx.errors import DataError, FpoError
from fpo_mlx.storage import lines
from fpo_mlx.storage.lines import LineWriter, decode, json_line, read_lines

ROWS = [{"n": n, "text": "ä" * n} for n in range(5)]


def written(path, rows):
    with LineWriter(path) as writer:
        for row in rows:
            writer.append(row)
    return path.read_bytes()


def test_a_file_cut_at_any_byte_goes_on_to_the_same_file(tmp_path):
    want = written(tmp_path / "whole.jsonl", ROWS)
    for cut in range(len(want)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(want[:cut])
        with LineWriter(path) as writer:
            there = len(list(read_lines(path)))
            for row in ROWS[there:]:
                writer.append(row)
        assert path.read_bytes() == want


def test_lines_are_read_with_their_places_and_a_cut_one_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n\n{"b":2}\n{"c"')
    assert list(read_lines(path)) == [(1, 0, b'{"a":1}\n'), (3, 9, b'{"b":2}\n')]


def test_a_users_last_line_without_an_end_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}')
    assert len(list(read_lines(path))) == 1
    assert written(path, [{"b": 2}]) == b'{"a":1}\n{"b": 2}\n'


def test_a_second_writer_is_refused(tmp_path):
    with LineWriter(tmp_path / "a.jsonl"), pytest.raises(FpoError, match="being written by"):
        LineWriter(tmp_path / "a.jsonl")


def test_half_a_surrogate_pair_is_written_and_comes_back():
    line = json_line({"a": "x\ud800"})
    assert json.loads(line) == {"a": "x\ud800"}


@pytest.mark.parametrize("line", [b"[1]", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_object_is_named_with_its_place(line):
    with pytest.raises(DataError, match="a.jsonl:3"):
        decode(line, "a.jsonl:3")


def test_a_cut_line_of_many_megabytes_is_mended_in_time_that_grows_with_its_length(tmp_path):
    """32 MB took 2.6 processor seconds where every piece was put before all that was read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"text": "' + b"x" * (32 << 20))
    begun = time.process_time()
    LineWriter(path).close()
    assert time.process_time() - begun < 1
    assert path.read_bytes() == b'{"a": 1}\n'


def test_zeros_that_a_crash_left_at_the_end_are_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bytes(100))
    assert written(path, [{"b": 2}]) == b'{"a": 1}\n{"b": 2}\n'


def test_a_last_line_of_somebody_else_is_refused_with_the_file_and_nothing_stays_open(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"my notes")
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(FpoError, match=r"a\.jsonl: its last line is no record: b'my notes'"):
        LineWriter(path)
    assert len(os.listdir("/dev/fd")) == before
    assert path.read_bytes() == b"my notes"


def test_lines_that_the_disk_did_not_take_are_gone_and_the_next_ones_follow_the_last_good(
    tmp_path, monkeypatch
):
    path, real = tmp_path / "a.jsonl", lines.flush_in_order
    fails = iter([True])

    def full(handle):
        if next(fails, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with LineWriter(path) as writer:
        writer.append({"a": 1})
        monkeypatch.setattr(lines, "flush_in_order", full)
        with pytest.raises(FpoError, match="cannot be written: No space left"):
            writer.append({"lost": 1}, {"lost": 2})
        assert path.read_bytes() == b'{"a": 1}\n'
        writer.append({"b": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


def test_on_a_mac_lines_that_the_drive_did_not_take_at_the_end_are_an_error(tmp_path, monkeypatch):
    """It is the one flush that is waited for, and its failure was not told."""

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "a.jsonl"
    monkeypatch.setattr(lines.sys, "platform", "darwin")
    monkeypatch.setattr(lines, "flush_in_order", lambda handle: None)
    monkeypatch.setattr(lines, "flush", broken)
    with (
        pytest.raises(FpoError, match="a.jsonl: .* Input/output error"),
        LineWriter(path) as writer,
    ):
        writer.append({"a": 1})
    with pytest.raises(KeyError, match="first"), LineWriter(path):
        raise KeyError("first")  # what ended the writing is told, not what came of it
    monkeypatch.setattr(lines, "flush", lambda handle: None)
    assert written(path, [{"b": 2}]) == b'{"a": 1}\n{"b": 2}\n'  # nothing stayed locked
