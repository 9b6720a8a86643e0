"""`train --resume` as a user gives it: what may have changed since, and what may not."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
from command_line import ROWS, lines, random_sae, refused, run, train, usual
from safetensors import safe_open
from safetensors.numpy import save_file

pytest.importorskip("mlx.core")

from fpo_mlx.config import TrainConfig  # noqa: E402
from fpo_mlx.errors import FpoError  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402
from fpo_mlx.storage import files  # noqa: E402
from fpo_mlx.train.checkpoint import AdapterFolder, interrupted  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    lines(root / "data" / "train.jsonl", *ROWS)
    lines(root / "data" / "valid.jsonl", {**ROWS[0], "prompt": "Held out?"})
    return root


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(place / "user-cache"))


def dpo(place, out, *words, **changes):
    return train(place, out, "--objective", "dpo", *words, sae=None, **changes)


def test_a_record_says_where_the_pairs_lay_and_follows_them(place, tmp_path, monkeypatch):
    """No setting: a run goes on where its data has moved."""
    data, out = tmp_path / "pairs", tmp_path / "run"
    shutil.copytree(place / "data", data)
    (data / "pairs.json").write_text("{}")
    said = hashlib.sha256(b"{}").hexdigest()
    monkeypatch.chdir(tmp_path)
    for place_of_data, words in ((data, ()), (data.with_name("moved"), ("--resume",))):
        data.rename(place_of_data)
        done = dpo(place, out, "--iters", 2 + len(words), *words, data=place_of_data.name)
        assert done.exit_code == 0, done.stderr
        record = json.loads((out / "run.json").read_text())
        assert record["source"] == {"data": str(place_of_data), "pairs": said}


@pytest.mark.parametrize(("before", "after"), [(25, 0), (0, 25)])
def test_validation_may_be_left_out_or_begun_by_a_resumed_run(place, tmp_path, before, after):
    assert dpo(place, tmp_path, "--val-batches", before).exit_code == 0
    more = dpo(place, tmp_path, "--val-batches", after, "--resume", "--iters", 3)
    assert more.exit_code == 0, more.stderr
    assert ((tmp_path / "best").is_dir()) == (max(before, after) > 0)
    log = (tmp_path / "metrics.jsonl").read_text()
    assert log.count('"valid"') == (2 if before else 1)


def test_a_run_without_held_out_pairs_says_so(place, tmp_path):
    """A lone file of pairs is trained on whole."""
    lone, told = place / "data" / "train.jsonl", "nothing is held out"
    assert told in dpo(place, tmp_path / "a", data=lone).stderr
    assert told not in dpo(place, tmp_path / "b").stderr
    assert told not in dpo(place, tmp_path / "c", "--val-batches", 0, data=lone).stderr
    words = usual(place, sae=None, data=lone)
    judged = run("evaluate", *words, "--adapter-path", tmp_path / "a", "--samples", 0)
    assert "was trained on these very pairs" in judged.stderr
    assert "--valid-share 0.2 in training and here" in judged.stderr  # a twentieth were none


def test_how_many_iterations_a_run_has_is_kept_and_follows_a_resumed_one(place, tmp_path):
    """`report` did not know it of the default length and of passes."""
    n = len(ROWS)
    for epochs, more in ((1, ()), (2, ("--resume",))):
        words = ["--objective", "dpo", "--epochs", epochs, "--batch-size", 1, *more]
        words += ["--adapter-path", tmp_path / "out"]
        done = run("train", *usual(place, sae=None), *words)
        assert done.exit_code == 0, done.stderr
        assert json.loads((tmp_path / "out" / "run.json").read_text())["iterations"] == n * epochs


def test_other_validation_pairs_are_refused(place, tmp_path):
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    lines(tmp_path / "data" / "valid.jsonl", ROWS[1])
    assert dpo(place, tmp_path / "out").exit_code == 0
    again = dpo(place, tmp_path / "out", "--resume", data=tmp_path / "data")
    refused(again, 2, "fingerprints.valid")


def test_other_pairs_are_told_in_words_with_their_counts(place, tmp_path):
    """It named the setting `fingerprints.data` and two hashes."""
    assert dpo(place, tmp_path / "out").exit_code == 0
    lines(tmp_path / "data" / "train.jsonl", *ROWS, {**ROWS[0], "prompt": "One more?"})
    shutil.copy(place / "data" / "valid.jsonl", tmp_path / "data")
    again = dpo(place, tmp_path / "out", "--resume", "--iters", 3, data=tmp_path / "data")
    n = len(ROWS)
    told = f"the training pairs: not what the run began with ({n} then, {n + 1} now)"
    refused(again, 2, told, "fingerprints.data", "Use the old values and files")


def test_iterations_that_are_no_whole_updates_are_rounded_up_and_said(place, tmp_path):
    done = dpo(place, tmp_path, "--iters", 5, "--grad-accumulation-steps", 2)
    assert done.exit_code == 0, done.stderr
    assert "--iters 5: 6 are done" in done.stderr
    assert (tmp_path / "0000006_adapters.safetensors").is_file()
    more = dpo(place, tmp_path, "--iters", 8, "--grad-accumulation-steps", 2, "--resume")
    assert "resumed after iteration 6" in more.stderr
    assert "are done" not in more.stderr


@pytest.mark.parametrize(
    "words", [("--objective", "dpo"), ("--objective", "tdpo2", "--target-kl", 1)]
)
def test_a_run_that_is_at_its_end_is_no_training_and_stays_as_it_is(place, tmp_path, words):
    """It announced a training, and fewer --iters were written into run.json."""
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    lines(tmp_path / "data" / "valid.jsonl", *ROWS * 8)
    out, how = tmp_path / "run", {"sae": None, "data": tmp_path / "data"}
    assert train(place, out, *words, "--iters", 3, **how).exit_code == 0

    def held():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before, told = held(), "is at iteration 3 already, and --iters counts from the start"
    again = train(place, out, *words, "--iters", 3, "--resume", **how)
    assert again.exit_code == 0, again.stderr
    assert f"{told}, to 3: --iters 103 trains 100 more" in again.stderr
    assert "training " not in again.stderr
    assert "Next:" not in again.stderr
    refused(train(place, out, *words, "--iters", 2, "--resume", **how), 2, told)
    assert held() == before


@pytest.mark.parametrize("how", [(), ("--resume",), ("--overwrite",)])
def test_the_folder_of_an_sae_is_refused_by_name(place, tmp_path, how):
    record = {"settings": {}, "fingerprints": {}, "plan": {"steps": 40}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for name in ("metrics.jsonl", "cfg.json"):
        (tmp_path / name).write_text("theirs")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = dpo(place, tmp_path, *how)
    refused(again, 2, "holds a run of `fpo-mlx sae train`, not of `fpo-mlx train`")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_its_checkpoint_is_not_taken_for_one_that_made_nothing(place, tmp_path):
    assert dpo(place, tmp_path).exit_code == 0
    shutil.rmtree(tmp_path / "checkpoint")
    again = dpo(place, tmp_path, "--resume")
    refused(again, 2, "holds adapters.safetensors and no checkpoint", "Use it as it is")
    assert "--overwrite" not in again.stderr
    assert "goes on with it" not in dpo(place, tmp_path).stderr


def test_what_a_resumed_run_has_changed_is_in_its_record(place, tmp_path):
    """`report` said of a run that had gone on that it was at its end, or far from it."""
    assert dpo(place, tmp_path, "--iters", 2).exit_code == 0
    assert dpo(place, tmp_path, "--iters", 3, "--save-every", 7, "--resume").exit_code == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["settings"]["iters"], record["settings"]["save_every"]) == (3, 7)
    assert record["changes"] == [{"iteration": 2, "before": {"iters": 2, "save_every": 100}}]
    again = dpo(place, tmp_path, "--iters", 4, "--save-every", 7, "--resume")
    assert again.exit_code == 0, again.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["iters"] == 4
    assert [change["before"].get("iters") for change in record["changes"]] == [2, 3]


def test_a_result_of_a_run_that_moved_and_then_went_on_is_an_older_one_of_its_own(place, tmp_path):
    from fpo_mlx.report.read import read_runs

    run_folder = tmp_path / "first"
    assert dpo(place, run_folder, "--save-every", 99).exit_code == 0
    for more in (3, 4):
        words = (*usual(place, sae=None), "--adapter-path", run_folder, "--split", "valid")
        file = run_folder / f"{more}.json"
        judged = run("evaluate", *words, "--samples", 0, "--no-kl", "--json", file)
        assert judged.exit_code == 0, judged.stderr
        run_folder = run_folder.rename(tmp_path / f"moved-{more}")
        assert dpo(place, run_folder, "--resume", "--iters", more).exit_code == 0
    (run_folder / "4.json").unlink()  # 3.json is from before both moves
    (read,) = read_runs([run_folder])
    assert read.results["evaluate"].stale
    assert not read.faults


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "1 validation pairs, 16 are needed"),
        (("--val-batches", 0), "0 validation pairs, 16 are needed"),
        (("--no-land",), None),
    ],
)
def test_a_run_that_cannot_be_landed_says_so_before_it_trains(place, tmp_path, words, why):
    flags = ("--objective", "tdpo2", "--target-kl", 0.5)
    done = train(place, tmp_path, *flags, *words, sae=None)
    assert done.exit_code == 0, done.stderr
    assert ("no landing" in done.stderr) is (why is not None)
    assert why is None or why in done.stderr
    assert done.stderr.find("no landing") < done.stderr.index("loss ")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ((), "Make room and run the command again"),
        (("run.json",), "Make room and begin anew with --overwrite"),
        (("run.json", "checkpoint/state.safetensors"), "Make room and go on with --resume"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_a_run_that_a_full_disk_ended_names_what_goes_on(tmp_path, there, said, plain):
    """The command again was refused: the folder holds a run."""
    full = OSError(errno.ENOSPC, "full")
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    error = (plain and files.unwritable(tmp_path, full)) or full
    with pytest.raises(FpoError, match=said), AdapterFolder(tmp_path, {}).writing():
        raise error


def test_a_stopped_run_names_the_command_that_goes_on():
    """The same command with --overwrite and --resume is refused."""
    for overwrite in (False, True):
        ended = interrupted(3, Path("out"), TrainConfig(overwrite=overwrite), 130)
        assert ("in place of --overwrite" in str(ended)) is overwrite
        assert ended.exit_code == 130


@pytest.fixture(scope="module")
def own(place, tmp_path_factory):
    """A model and an SAE whose files a test may change, and the adapters to begin with."""
    root = tmp_path_factory.mktemp("own")
    for name in ("model", "data"):
        shutil.copytree(place / name, root / name)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    begun = train(root, root / "init", "--learning-rate", 1e-2)
    assert begun.exit_code == 0, begun.stderr
    return root


def other_template(root: Path) -> None:
    path = root / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ '' }}")


def other_numbers(path: Path) -> None:
    """The last number of every tensor is another one."""
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    for array in arrays.values():
        array.reshape(-1)[-1] += 0.01
    save_file(arrays, path, about)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer", other_template),
        ("saes", lambda root: other_numbers(root / "sae" / "sae_weights.safetensors")),
        ("adapter", lambda root: other_numbers(root / "init" / "adapters.safetensors")),
        ("model", lambda root: other_numbers(root / "model" / "model.safetensors")),
    ],
)
def test_what_lies_at_the_same_path_and_is_another_one_is_refused(own, tmp_path, name, change):
    root = shutil.copytree(own, tmp_path / "root")
    words = ("--init-adapter", root / "init")
    begun = train(root, root / "run", *words, "--iters", 1)
    assert begun.exit_code == 0, begun.stderr
    change(root)
    again = train(root, root / "run", *words, "--iters", 1, "--resume")
    refused(again, 2, f"fingerprints.{name}")
    assert again.stderr.count("fingerprints.") == 1
