"""Where files go: full disks, forbidden places, and a second process on the same folder."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_models
from click.testing import CliRunner, Result
from command_line import ROWS, lines, random_sae

from fpo_mlx.cli import main
from fpo_mlx.errors import FpoError
from fpo_mlx.sae.convert import write_saelens
from fpo_mlx.storage import files, locks
from fpo_mlx.storage.publish import upload

pytest.importorskip("mlx.core")

ROOM = 5000  # bytes: more than a run's record has, less than its adapters
COMMANDS = ("precompute", "train", "fuse", "convert", "sae convert")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPO_MLX_CACHE", str(root / "user-cache"))
        tiny_models.tiny_llama(root / "model", tokenizer=True, num_hidden_layers=2)
        write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
        lines(root / "data" / "train.jsonl", *ROWS)
        lines(root / "few" / "train.jsonl", *ROWS[:2])
        assert run(*words_of("precompute", root, root / "ref")).exit_code == 0
        assert run(*words_of("train", root, root / "adapters")).exit_code == 0
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))


def words_of(command: str, root: Path, out: Path, data: str = "data") -> list[object]:
    usual = ["--model", root / "model", "--data", root / data, "--sae", root / "sae"]
    flags = ["--top-k", 5, "--iters", 2, "--batch-size", 1, "--num-layers", 1, "--save-every", 1]
    return {
        "precompute": ["precompute", *usual, "--output", out],
        "train": ["train", *usual, *flags, "--reference", root / "ref", "--adapter-path", out],
        "fuse": ["fuse", "--model", root / "model", "--adapter-path", root / "adapters",
                 "--save-path", out],
        "convert": ["convert", "--hf-path", root / "model", "--mlx-path", out],
        "sae convert": ["sae", "convert", root / "sae", "--dtype", "float16", "--output", out],
    }[command]  # fmt: skip


def again(command: str, out: Path) -> list[str]:
    """What lets the command replace an earlier run's; a cache is extended without."""
    replaces = command != "precompute" and any(out.glob("*"))
    return ["--overwrite"] if replaces else []


def older(command: str, root: Path, out: Path) -> None:
    """What an earlier run of the command left at `out` (convert refuses to replace anything)."""
    if command == "convert":
        return
    done = run(*words_of(command, root, out, data="few"))
    assert done.exit_code == 0, done.stderr


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system refuses to write beyond this many bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def plain(result: Result, *parts: object) -> None:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("fpo-mlx: ") == 1, result.stderr
    for part in parts:
        assert str(part) in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("size", [0, 1200])
def test_a_full_disk_is_a_plain_error_and_damages_nothing(place, tmp_path, command, size):
    out = tmp_path / "stage" / "out"
    older(command, place, out)
    before = tree(tmp_path / "stage")
    with files_end_at(size):
        result = run(*words_of(command, place, out), *again(command, out))
    plain(result, "cannot be written", "What was there is untouched")
    assert tree(tmp_path / "stage") == before
    repeated = run(*words_of(command, place, out), *again(command, out))
    assert repeated.exit_code == 0, repeated.output


def test_a_disk_that_is_full_after_a_runs_first_files_leaves_them_whole(place, tmp_path):
    """There is room for its record and its log, and none for adapters."""
    out = tmp_path / "out"
    older("train", place, out)
    with files_end_at(ROOM):
        done = run(*words_of("train", place, out), "--overwrite", "--steps-per-report", 1)
    plain(done, "adapters.safetensors cannot be written")
    left = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert set(left) == {"run.json", "metrics.jsonl"}
    assert json.loads(left["run.json"])["settings"]["data"] == str(place / "data")
    log = left["metrics.jsonl"].decode()
    assert log.endswith("\n")
    assert [json.loads(line)["iteration"] for line in log.splitlines()] == [1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_below_a_file_is_a_plain_error(place, tmp_path, command):
    (tmp_path / "file").write_text("kept")
    result = run(*words_of(command, place, tmp_path / "file" / "out"))
    plain(result, tmp_path / "file" / "out", "cannot be written: ", "Name another place")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_place_is_a_plain_error(place, tmp_path, command, monkeypatch):
    forbidden, mkdir = tmp_path / "ro", Path.mkdir

    def refuse(self: Path, *args, **kwargs):
        if self == forbidden or forbidden in self.parents:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run(*words_of(command, place, forbidden / "out"))
    plain(result, "cannot be written: Read-only file system", "Name another place")
    assert not forbidden.exists()


LOCKS = {"precompute": "out/writer.lock", "train": "out/train.lock"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_process_is_refused_with_the_first_ones_name(place, tmp_path, command):
    out = tmp_path / "stage" / "out"
    older(command, place, out)
    lock = tmp_path / "stage" / LOCKS.get(command, ".out.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locks.held(lock, out):
        before = tree(tmp_path / "stage")
        result = run(*words_of(command, place, out), *again(command, out))
        assert tree(tmp_path / "stage") == before
    plain(result, f"{out} is being written by pid ", "Wait for it to end")


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_failed_write_names_the_file_and_the_way_out(tmp_path, monkeypatch, failure):
    path = tmp_path / "a.json"
    files.write_json(path, 1)

    def refuse(_: int) -> None:
        raise OSError(failure, "no")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(FpoError, match=r"a\.json cannot be written: .* is untouched\. \w+"):
        files.write_json(path, 2)
    assert json.loads(path.read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_any_other_error_in_the_block_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError), files.atomic_path(tmp_path / "a"):
        raise KeyError("mine")
    with pytest.raises(FileNotFoundError), files.atomic_folder(tmp_path / "b") as folder:
        (folder / "absent").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_swapped_in_one_step_and_killed_writers_leavings_go(tmp_path):
    (tmp_path / ".tmp-7-out").mkdir()
    (tmp_path / ".tmp-7.old-out").mkdir()
    (tmp_path / ".tmp-7-other-out").mkdir()
    for text in ("one", "two"):
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / text).write_text(text)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-7-other-out", "out"]


def test_without_the_swap_of_the_system_it_is_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    for text in ("one", "two"):
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / text).write_text(text)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_fused_model_that_the_hub_refuses_is_there_with_all_that_was_found(
    place, tmp_path, monkeypatch
):
    def refuses():
        raise OSError("401 no token\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", refuses)
    words = words_of("fuse", place, tmp_path / "fused")
    done = run(*words, "--json", tmp_path / "fused.json", "--upload-repo", "me/model")
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert "layers fused, float" in done.output
    assert "me/model: the upload failed (OSError: 401 no token). The fused model is in" in (
        done.output
    )
    assert json.loads((tmp_path / "fused.json").read_text())["fused_layers"]
    assert (tmp_path / "fused" / "config.json").is_file()


@pytest.mark.parametrize(
    ("there", "left"),
    [
        (["README.md", "model.safetensors", "old.gguf"], None),
        (["model-00001-of-00002.safetensors", "model.safetensors"], "model-00001-of-00002"),
    ],
)
def test_weights_of_an_earlier_upload_are_never_mixed_with_these(
    tmp_path, monkeypatch, there, left
):
    """Loaders read every model*.safetensors."""
    sent = []

    class Hub:
        def create_repo(self, repo, exist_ok):
            pass

        def list_repo_files(self, repo):
            return there

        def upload_folder(self, **given):
            sent.append(given["repo_id"])

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (tmp_path / "model.safetensors").touch()
    if left is None:
        upload(tmp_path, "me/model", "The fused model")
        assert sent == ["me/model"]
        return
    with pytest.raises(
        FpoError, match=f"me/model holds {left}.*which this folder does not"
    ) as said:
        upload(tmp_path, "me/model", "The fused model")
    assert "failed" not in str(said.value)
    assert not sent


def test_an_uploaded_folder_is_as_it_was_fused(place, tmp_path, monkeypatch):
    sent = []

    class Hub:
        def create_repo(self, repo, exist_ok):
            pass

        def list_repo_files(self, repo):
            return []

        def upload_folder(self, *, folder_path, allow_patterns, **more):
            assert allow_patterns is None
            sent.append({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    words = words_of("fuse", place, tmp_path / "fused")
    done = run(*words, "--upload-repo", "me/model")
    assert done.exit_code == 0, done.output
    assert "uploaded to me/model" in done.output
    assert sent == [{p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()}]
    assert run(*words, "--overwrite").exit_code == 0


TERMS = ("LICENSE", "NOTICE.txt", "USE_POLICY.md")
BESIDE = ("qwen.tiktoken", "spm.model", "vocab.bpe", "tools.jinja", "tokenizer_x.py",
          "generation_utils.py", *TERMS)  # fmt: skip
MINE = ("mine.py", "modeling_mine.py", "my_variant.jinja", "tokenizer_notes.md", "vocab.csv",
        "mine.model", "mine.tiktoken")  # fmt: skip


def from_other_base(command: str, place: Path, base: Path, out: Path) -> list[object]:
    """The words of a command whose base is a copy that has further files."""
    shutil.copytree(place / "model", base)
    for name in BESIDE:
        (base / name).write_text("")
    return [base if word == place / "model" else word for word in words_of(command, place, out)]


@pytest.mark.parametrize(
    ("command", "copied"), [("fuse", BESIDE), ("convert", ("generation_utils.py", *TERMS))]
)
def test_a_folder_is_replaced_with_all_that_it_has_from_its_base(place, tmp_path, command, copied):
    words = from_other_base(command, place, tmp_path / "base", tmp_path / "out")
    assert run(*words).exit_code == 0
    assert {*copied} <= {path.name for path in (tmp_path / "out").iterdir()}
    done = run(*words, "--overwrite")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", ["fuse", "convert"])
def test_licence_files_of_another_base_are_replaced(place, tmp_path, command):
    """They were taken for the user's own where the next base has none."""
    out = tmp_path / "out"
    shutil.copytree(place / "model", tmp_path / "base")
    for name in TERMS:
        (tmp_path / "base" / name).write_text("terms")
    words = words_of(command, place, out)
    of_base = [tmp_path / "base" if word == place / "model" else word for word in words]
    assert run(*of_base).exit_code == 0
    assert {*TERMS} <= {path.name for path in out.iterdir()}
    done = run(*words, "--overwrite")
    assert done.exit_code == 0, done.output
    assert not {*TERMS} & {path.name for path in out.iterdir()}


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("command", ["fuse", "convert"])
def test_what_only_is_called_like_a_file_of_a_model_stays(place, tmp_path, command, name):
    words = from_other_base(command, place, tmp_path / "base", tmp_path / "out")
    assert run(*words).exit_code == 0
    (tmp_path / "out" / name).write_text("my own")
    refused = run(*words, "--overwrite")
    assert refused.exit_code == 2, refused.output
    assert f"holds {name}, which a model folder does not have" in refused.output
    assert (tmp_path / "out" / name).read_text() == "my own"
