"""What a Finder, a network disk or an exFAT stick leaves in a folder is nobody's file."""

from __future__ import annotations

import json
import os
import stat
from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_llama

from fpo_mlx.data import read
from fpo_mlx.data.check import CheckReport
from fpo_mlx.pipeline import rounds_settings
from fpo_mlx.pipeline.saes import SAE
from fpo_mlx.reference import weights
from fpo_mlx.sae import files as sae_files
from fpo_mlx.storage import files, limits, lines, outputs

# the package's own name for it is a function
check = import_module("fpo_mlx.pipeline.check")
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def litter(folder, *names: str) -> None:
    """.DS_Store, and the AppleDouble file of each name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    for name in names:
        (folder / f"._{name}").write_bytes(APPLE_DOUBLE)


def test_a_listing_is_sorted_and_leaves_out_dot_files_at_any_depth(tmp_path):
    litter(tmp_path, "a.json")
    litter(tmp_path / "inner", "b.json")
    litter(tmp_path / ".Trashes", "c.json")
    for name in ("b.json", "a.json", "inner/b.json", ".Trashes/c.json"):
        (tmp_path / name).write_text("{}")
    names = [path.name for path in files.listed(tmp_path)]
    assert names == ["a.json", "b.json", "inner"]
    assert files.listed(tmp_path, "*.json") == [tmp_path / "a.json", tmp_path / "b.json"]
    deep = [path.relative_to(tmp_path).as_posix() for path in files.listed(tmp_path, "**/*.json")]
    assert deep == ["a.json", "b.json", "inner/b.json"]
    assert files.listed(tmp_path / "none") == files.listed(tmp_path / "a.json") == []


def test_a_folder_that_lies_below_a_dot_folder_is_listed(tmp_path):
    """As the hub's cache in ~/.cache."""
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    (tmp_path / ".cache" / "x" / "a").write_text("")
    assert [p.name for p in files.listed(tmp_path / ".cache" / "x")] == ["a"]


def test_fuse_and_sae_convert_take_a_folder_with_only_litter_for_an_empty_one(tmp_path):
    litter(tmp_path / "new", "config.json")
    outputs.claim_folder(tmp_path / "new", "--save-path", outputs.MODEL)
    outputs.claim_folder(tmp_path / "new", "--output", SAE)


def test_a_model_whose_weights_are_not_named_model_reads_as_without_litter(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    clean = weights.model_fingerprint(folder), sorted(limits._shapes(folder))
    litter(folder, "weights.safetensors", "model.safetensors", "config.json")
    assert (weights.model_fingerprint(folder), sorted(limits._shapes(folder))) == clean


def test_the_model_itself_is_loaded_from_a_folder_with_litter(tmp_path):
    from fpo_mlx.model.load import load_model

    folder = tiny_llama(tmp_path / "model")
    tokens = mx.array([[3, 4, 5]])
    want = np.array(load_model(folder).model(tokens))
    litter(folder, "model.safetensors", "config.json")
    np.testing.assert_array_equal(np.array(load_model(folder).model(tokens)), want)


def test_a_data_folder_with_litter_has_its_own_splits_only(tmp_path):
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    for place in ("train.jsonl", "valid.jsonl"):
        (tmp_path / place).write_text(row)
    clean = read._folder_splits(tmp_path, read.HubSplits(), "train")
    litter(tmp_path, "train.jsonl", "valid.jsonl", "more.jsonl")
    assert read._folder_splits(tmp_path, read.HubSplits(), "train") == clean


def test_litter_in_a_round_is_nothing_that_was_made_with_its_settings(tmp_path):
    litter(tmp_path / "round-1", "verdicts.jsonl")
    assert not rounds_settings._is_made(tmp_path, "judge")
    (tmp_path / "round-1" / "verdicts.jsonl").write_text("{}\n")
    assert rounds_settings._is_made(tmp_path, "judge")


def test_litter_is_not_counted_among_the_reports_of_check_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "REPORTS_KEPT", 2)
    old = tmp_path / "old.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    litter(tmp_path, "new.json", "old.json")
    check._keep(tmp_path / "new.json", CheckReport({}, (), {}, None))
    assert old.is_file()


def test_one_file_under_two_names_is_one_setting_of_a_round(tmp_path):
    (tmp_path / "prompts.txt").write_text("Why?")
    os.link(tmp_path / "prompts.txt", tmp_path / "the-same.txt")
    names = [str(tmp_path / name) for name in ("prompts.txt", "the-same.txt", "gone.txt")]
    assert rounds_settings._alike("prompts", *names[:2])
    assert not rounds_settings._alike("prompts", *names[1:])
    assert not rounds_settings._alike("seed", *names[:2])


def test_the_weights_of_an_sae_are_found_beside_litter(tmp_path):
    litter(tmp_path, "sae_weights.safetensors")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    assert sae_files.weight_file(tmp_path) == tmp_path / "sae_weights.safetensors"


def test_a_folder_that_cannot_be_synced_does_not_undo_a_rename_that_was_made(tmp_path, monkeypatch):
    """Network disks and exFAT refuse to sync a folder; the file is there all the same."""
    real = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.write_text(tmp_path / "a.txt", "whole")
    with files.atomic_folder(tmp_path / "folder") as work:
        (work / "b").write_text("whole")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "folder" / "b").read_text() == "whole"


def test_a_file_that_cannot_be_synced_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.txt", "old")

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def a_mac(monkeypatch, refuses):
    """The commands that its drive is given, all but these carried out, and what is fsynced."""
    asked, plain = [], []

    def control(handle: int, command: int) -> int:
        asked.append(command)
        if command in refuses:
            raise OSError(45, "Operation not supported")
        return 0

    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", control)
    monkeypatch.setattr(files.os, "fsync", plain.append)
    return asked, plain


@pytest.mark.parametrize("refused", [False, True])
def test_on_a_mac_the_disks_own_cache_is_flushed_where_it_can_be(tmp_path, monkeypatch, refused):
    """fsync leaves data in the drive there; F_FULLFSYNC (51) does not, and some disks lack it."""
    asked, plain = a_mac(monkeypatch, refuses=(51,) if refused else ())
    files.write_text(tmp_path / "a.txt", "whole")
    assert asked == [51, 51]  # the file, and its folder
    assert len(plain) == (2 if refused else 0)


@pytest.mark.parametrize("refused", [False, True])
def test_on_a_mac_the_disk_is_waited_for_once_a_file_of_lines_and_not_once_a_line(
    tmp_path, monkeypatch, refused
):
    """F_FULLFSYNC (51) waits for the drive there; F_BARRIERFSYNC (85) only keeps the order."""
    asked, plain = a_mac(monkeypatch, refuses=(85,) if refused else ())
    with lines.LineWriter(tmp_path / "a.jsonl") as writer:
        writer.append({"verdict": "a"})
        writer.append({"verdict": "b"})
    assert asked == ([85, 51] * 2 if refused else [85] * 2) + [51]
    assert not plain
    assert (tmp_path / "a.jsonl").read_text().count("\n") == 2
