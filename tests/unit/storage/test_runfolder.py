"""The folder that every kind of training writes: record, log, and whether a run can go on."""

import json
from pathlib import Path

import pytest

from fpo_mlx.errors import ConfigError, ModelError
from fpo_mlx.storage.outputs import Made
from fpo_mlx.storage.runfolder import RunFolder

RECORD = {"settings": {"lr": 1e-5, "keys": ["a"]}, "fingerprints": {"data": "x"}}


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path, Path("checkpoint") / "state", "--out")
    made.write_record(RECORD)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state").touch()
    return made


def test_a_log_is_cut_to_where_a_state_was_saved(folder):
    assert folder.rewind_log(10) == 0  # no report came before the state
    length = folder.log({"step": 1})
    folder.log({"step": 2})
    assert folder.rewind_log(length) == length
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("left", [b"", b'{"st', b'{"step": 2}', bytes(5000), b"x" * 200_000])
def test_a_log_that_a_power_cut_left_too_short_ends_with_its_last_whole_line(folder, left):
    """Of which the state knows nothing: it remembers the length that the log had."""
    path = folder.path / "metrics.jsonl"
    length = folder.log({"step": 1})
    with path.open("ab") as file:
        file.write(left)
    assert folder.rewind_log(10**6) == length
    assert path.read_text() == '{"step": 1}\n'


def test_a_number_that_json_does_not_have_is_null_in_the_log(folder):
    nan, inf = float("nan"), float("inf")
    folder.log({"loss": nan, "metrics": {"kl": -inf, "n": 2, "ok": True}, "of": (inf, 1.5, "NaN")})
    text = (folder.path / "metrics.jsonl").read_text()
    wanted = {"loss": None, "metrics": {"kl": None, "n": 2, "ok": True}, "of": [None, 1.5, "NaN"]}
    assert json.loads(text, parse_constant=pytest.fail) == wanted


def test_a_note_stands_beside_the_start(folder):
    folder.note({"memory": 1})
    assert json.loads(folder.record.read_text()) == {**RECORD, "memory": 1}


def test_the_same_settings_may_go_on_and_others_are_named(folder):
    same = {"settings": {"lr": 1e-5, "keys": ("a",)}, "fingerprints": {"data": "x"}}
    assert folder.check_resumable(same, ()) == RECORD
    other = {"settings": {"lr": 1e-4, "keys": ["a"]}, "fingerprints": {"data": "y"}}
    with pytest.raises(ConfigError) as caught:
        folder.check_resumable(other, ())
    text = str(caught.value)
    assert "  settings.lr: was 1e-05, now 0.0001\n  the training pairs: not what" in text
    assert "; fingerprints.data: was 'x', now 'y'" in text
    assert text.endswith("start anew in another --out.")
    assert "fingerprints.data" in refusal(folder, other, ("data",))  # frees a setting of that name


def refusal(folder, run, may_change) -> str:
    with pytest.raises(ConfigError) as caught:
        folder.check_resumable(run, may_change)
    return str(caught.value)


def test_a_setting_that_an_older_version_did_not_have_was_at_its_default(folder):
    newer = {"settings": {**RECORD["settings"], "link": "sigmoid"}, "fingerprints": {"data": "x"}}
    folder.check_resumable(newer, (), {"link": "sigmoid"})
    newer["settings"]["link"] = "hinge"
    with pytest.raises(ConfigError, match="link: was 'sigmoid', now 'hinge'"):
        folder.check_resumable(newer, (), {"link": "sigmoid"})


def test_a_folder_without_a_checkpoint_or_with_a_damaged_record_is_refused(folder):
    for text in ("[]", "{", '{"settings": 1, "fingerprints": {}}'):
        folder.record.write_text(text)
        with pytest.raises(ModelError, match=r"run\.json is damaged .* in another --out\."):
            folder.check_resumable(RECORD, ())
        with pytest.raises(ModelError, match=r"is damaged .* what the run made is whole"):
            folder.note({"memory": 1})
        assert folder.record.read_text() == text
    (folder.path / "checkpoint" / "state").unlink()
    with pytest.raises(ConfigError, match="ended before its first checkpoint .* --overwrite in"):
        folder.check_resumable(RECORD, ())
    assert folder.as_made(Made("a run", ".*", ways="--resume goes on; ")).ways == ""
    folder.record.unlink()
    with pytest.raises(ConfigError, match="holds no checkpoint. Start without --resume"):
        folder.check_resumable(RECORD, ())


def test_what_an_older_version_took_no_fingerprint_of_is_not_compared(folder):
    newer = {**RECORD, "fingerprints": {"data": "x", "valid": "v"}}
    assert folder.check_resumable(newer, ()) == RECORD
    folder.write_record(newer)
    other = {**RECORD, "fingerprints": {"data": "x", "valid": "w"}}
    assert "fingerprints.valid: was 'v', now 'w'" in refusal(folder, other, ())


def test_a_fingerprint_counts_where_what_it_is_of_is_read_before_and_after(folder):
    """Pairs that are gone are not the same as pairs that nobody asked for."""
    needed = {"valid": "val_batches"}

    def record(valid, batches, data="x"):
        settings = {**RECORD["settings"], "val_batches": batches}
        return {**RECORD, "settings": settings, "fingerprints": {"data": data, "valid": valid}}

    for before, now in ((record("v", 25), record("0", 0)), (record("0", 0), record("v", 25))):
        folder.write_record(before)
        folder.check_resumable(now, {"val_batches"}, needed_by=needed)
    folder.write_record(record("v", 25))
    for now in (record("0", 25), record("w", 10)):
        with pytest.raises(ConfigError, match=r"fingerprints\.valid: was 'v'"):
            folder.check_resumable(now, {"val_batches"}, needed_by=needed)
    with pytest.raises(ConfigError, match=r":\n  .*; fingerprints\.data: was 'x', now '0'\nUse"):
        folder.check_resumable(record("0", 0, "0"), {"val_batches"}, needed_by=needed)
