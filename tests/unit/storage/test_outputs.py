"""What a command may write to: nothing of the user's is lost, by whatever name it is called."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fpo_mlx.config import load_config
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.train import RUN as TRAIN
from fpo_mlx.storage import files, outputs
from fpo_mlx.storage.outputs import Made, claim_file, claim_files, claim_folder

RUN = Made("a run", r"run\.json|best/", ways="--resume goes on with it; ")
MODEL = Made("a model", r"config\.json|.*\.safetensors", whole=True)


def file(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("made", [RUN, MODEL])
def test_a_place_where_nothing_is_can_be_written_to(tmp_path, made):
    claim_folder(tmp_path / "new", "--to", made)
    (tmp_path / "empty").mkdir()
    claim_folder(tmp_path / "empty", "--to", made)
    claim_file(tmp_path / "a/b.json", "--json")
    claim_file(file(tmp_path / "nothing.json", ""), "--json")


def test_the_place_of_a_disk_is_no_folder_that_can_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs.os.path, "ismount", lambda place: Path(place) == tmp_path)
    with pytest.raises(ConfigError, match="a disk is mounted here.*Name a folder in it"):
        claim_folder(tmp_path, "--save-path", MODEL)
    assert claim_folder(tmp_path / "in", "--save-path", MODEL) == tmp_path / "in"
    assert claim_folder(tmp_path, "--adapter-path", RUN) == tmp_path  # files are put in it


def test_what_the_system_or_a_killed_run_left_is_nothing(tmp_path):
    for name in (".DS_Store", "train.lock", ".tmp-123-run.json"):
        file(tmp_path / name)
    claim_folder(tmp_path, "--to", RUN)


USERS = (
    "uv.lock",
    "poetry.lock",
    "tensorboard/events",
    "._mine/notes",
    ".DS_Store/notes",
    "train.lock",
)


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_replaced_as_one_holds_nothing_of_anyone(tmp_path, name, overwrite):
    file(tmp_path / "out" / name)
    with pytest.raises(ConfigError, match=f"holds {name.split('/')[0]}.*Name a new folder"):
        claim_folder(tmp_path / "out", "--to", outputs.MODEL, overwrite=overwrite)


def test_what_finder_leaves_is_nothing_in_any_folder(tmp_path):
    for name in (".DS_Store", "._config.json", ".localized"):
        file(tmp_path / name)
    claim_folder(tmp_path, "--to", outputs.MODEL)


MINE = ("tokenizer-experiments/a", "model-Q4_K_M.gguf", "README.md", "adapters.safetensors")


@pytest.mark.parametrize("name", MINE)
def test_of_a_model_folder_only_what_is_written_there_can_be_replaced(tmp_path, name):
    file(tmp_path / "config.json")
    file(tmp_path / "model-00001-of-00002.safetensors")
    file(tmp_path / "ggml-model-f16.gguf")
    file(tmp_path / "README.md", "---\nlanguage: en\nlibrary_name: mlx\n---\n")
    claim_folder(tmp_path, "--to", outputs.MODEL, overwrite=True)
    file(tmp_path / name)
    with pytest.raises(ConfigError, match=f"holds {name.split('/')[0]}.*Name a new folder"):
        claim_folder(tmp_path, "--to", outputs.MODEL, overwrite=True)


@pytest.mark.parametrize("name", ["run.json", "best/adapters.safetensors", "best"])
def test_a_link_within_a_folder_that_is_written_into_is_refused(tmp_path, name):
    """Written through it, the bytes would land in another's folder."""
    file(tmp_path / "out/run.json")
    other = file(tmp_path / "other/adapters.safetensors")
    link = tmp_path / "out" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(other.parent if name == "best" else other)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=f"{name}.* link|holds (a run|best)"):
            claim_folder(tmp_path / "out", "--to", RUN, overwrite=overwrite)
    assert other.read_text() == "mine"


@pytest.mark.parametrize("name", ["best/x.bin", "checkpoint/my.ckpt", "metrics.jsonl"])
def test_names_of_a_run_without_its_mark_are_somebody_elses(tmp_path, name):
    """Its names are common ones: `best/`, `checkpoint/`."""
    file(tmp_path / name)
    with pytest.raises(ConfigError, match=r"no run\.json.*Name a new folder"):
        claim_folder(tmp_path, "--to", TRAIN, overwrite=True)


def test_the_place_that_was_claimed_is_the_place_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert claim_folder("~/a", "--to", RUN) == tmp_path / "a"
    assert claim_file("~/a.json", "--json") == tmp_path / "a.json"


@pytest.mark.parametrize("name", ["run.json", "best/adapters.safetensors"])
def test_a_folder_that_is_written_into_may_hold_what_is_read_beside_its_own_names(tmp_path, name):
    file(tmp_path / "out/run.json")
    ref = file(tmp_path / "out/ref/manifest.json").parent
    claim_folder(tmp_path / "out", "--to", RUN, inputs=[ref], overwrite=True)
    with pytest.raises(ConfigError, match="which the command reads"):
        claim_folder(
            tmp_path / "out", "--to", RUN, inputs=[file(tmp_path / "out" / name)], overwrite=True
        )


def test_a_file_that_is_there_needs_overwrite(tmp_path):
    place = file(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"--json .*a\.json: a file of 4 bytes .*--overwrite"):
        claim_file(place, "--json")
    claim_file(place, "--json", overwrite=True)


def test_an_older_run_is_named_with_what_can_be_done(tmp_path):
    file(tmp_path / "run.json")
    (tmp_path / "best").mkdir()
    with pytest.raises(
        ConfigError, match=r"holds a run \(best/, run\.json\)\. --resume .*--overwrite"
    ):
        claim_folder(tmp_path, "--to", RUN)
    claim_folder(tmp_path, "--to", RUN, overwrite=True)


def test_other_files_are_named_and_overwrite_takes_only_a_folder_that_keeps_them(tmp_path):
    for n in range(6):
        file(tmp_path / f"note{n}.txt")
    with pytest.raises(ConfigError, match=r"note0\.txt, note1.*note3\.txt and 2 more"):
        claim_folder(tmp_path, "--to", RUN)
    claim_folder(tmp_path, "--to", RUN, overwrite=True)
    file(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="a model does not have.*Name a new folder"):
        claim_folder(tmp_path, "--to", MODEL, overwrite=True)


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="this is a folder"):
        claim_file(tmp_path, "--json", overwrite=True)
    with pytest.raises(ConfigError, match="this is a file"):
        claim_folder(file(tmp_path / "a"), "--to", RUN, overwrite=True)


CLAIM = {
    "file": lambda place, inputs: claim_file(place, "--json", inputs=inputs, overwrite=True),
    "folder": lambda place, inputs: claim_folder(
        place, "--to", MODEL, inputs=inputs, overwrite=True
    ),
}


def spellings(path):
    """Other names of one file or folder."""
    top = path.parent
    link = top / "link"
    link.symlink_to(path)
    yield "plain", path
    yield "dots", path.parent / "x" / ".." / path.name
    yield "link", link
    yield "relative", path.relative_to(os.getcwd())
    if path.is_file():
        os.link(path, top / "hard")
        yield "hard link", top / "hard"
    else:
        yield "the folder around it", top


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_read_is_never_written_by_whatever_name(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/x").mkdir(parents=True)
    source = tmp_path / "in/source"
    file(source if kind == "file" else source / "config.json")
    for name, place in spellings(source):
        assert name
        inputs = [None, "a/hub-id", source]
        with pytest.raises(ConfigError, match="which the command reads"):
            CLAIM[kind](place, inputs)


def test_a_folder_of_another_letter_case_is_the_same_where_the_disk_says_so(tmp_path, monkeypatch):
    """As on a Mac's disk: `samefile` decides, not the letters."""
    source = file(tmp_path / "base/config.json").parent
    os.link(source / "config.json", tmp_path / "CONFIG.JSON")
    with pytest.raises(ConfigError, match="which the command reads"):
        claim_file(tmp_path / "CONFIG.JSON", "--json", inputs=[source / "config.json"])


def test_a_part_of_a_folder_that_is_read_cannot_be_overwritten(tmp_path):
    data = file(tmp_path / "data/train.jsonl").parent
    with pytest.raises(ConfigError, match=r"part of .*data, which the command reads"):
        claim_file(data / "train.jsonl", "--json", inputs=[data], overwrite=True)
    claim_file(data / "findings.json", "--json", inputs=[data])


def test_results_may_stand_in_the_folder_of_the_run_that_they_are_of(tmp_path):
    run = file(tmp_path / "run/adapter_config.json").parent
    for name in ("run.json", "adapters.safetensors", "best/adapters.safetensors"):
        with pytest.raises(ConfigError, match="a part of"):
            claim_file(file(run / name), "--json", inputs=[run], overwrite=True)
    claim_file(file(run / "scores.json"), "--json", inputs=[run], overwrite=True)


def test_two_results_of_one_command_have_two_places(tmp_path):
    places = {"--json": tmp_path / "a", "--csv": tmp_path / "x/../a"}
    with pytest.raises(ConfigError, match="--json and --csv both name"):
        claim_files(places)
    claim_files({"--json": tmp_path / "a", "--csv": None})


def test_pipes_and_devices_are_written_as_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    claim_file(tmp_path / "pipe", "--json", inputs=[tmp_path / "pipe"])
    claim_files({"--json": tmp_path / "pipe", "--csv": tmp_path / "pipe"})


def test_the_record_of_an_infinite_bound_is_json_and_is_read_back_as_one():
    """It held `Infinity`, which other readers of JSON refuse."""
    given = load_config({"max_margin": "inf", "epochs": 0.5})
    text = files.json_text(outputs.of_the_run(given.as_dict()))
    kept = json.loads(text, parse_constant=pytest.fail)
    found = load_config({name: kept[name] for name in ("max_margin", "epochs")})
    assert (found.train.max_margin, kept["epochs"]) == (float("inf"), 0.5)
