"""`plan` and `pairs plan` of a hub's model: by headers alone, with the figures of its folder."""

from __future__ import annotations

import fnmatch
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import ROWS, lines, refused, run

mx = pytest.importorskip("mlx.core")

import huggingface_hub  # noqa: E402
import tiny_models  # noqa: E402
from quantised import quantised  # noqa: E402

from fpo_mlx.machine.answering import Speed  # noqa: E402
from fpo_mlx.storage.headers import has_weights  # noqa: E402
from fpo_mlx.storage.tensors import read_header  # noqa: E402

SPEC = "owner/model"
UNREACHED = huggingface_hub.errors.OfflineModeIsEnabled("cannot reach the hub: offline mode")


class Hub:
    """One repository; the client's functions over folders, and what was asked of them."""

    def __init__(self, remote: Path, root: Path) -> None:
        self.remote, self.snapshot = remote, root / "models--owner--model/snapshots/main"
        self.fetched: list[str] = []
        self.headers: list[str] = []
        self.reachable, self.broken = True, False

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns) -> str:
        assert (repo, revision) == (SPEC, None)
        if not self.reachable and not self.snapshot.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing in the cache")
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.remote.iterdir() if self.reachable else ():
            named = [any(fnmatch.fnmatch(path.name, p) for p in ps) for ps in (allow_patterns,
                     ignore_patterns)]  # fmt: skip
            if named == [True, False] and not (self.snapshot / path.name).exists():
                shutil.copy(path, self.snapshot / path.name)
                self.fetched.append(path.name)
        return str(self.snapshot)

    def try_to_load_from_cache(self, repo, name, revision=None) -> str | None:
        path = self.snapshot / name
        return str(path) if repo == SPEC and path.exists() else None

    def model_info(self, repo, revision=None):
        assert (repo, revision) == (SPEC, None)
        if not self.reachable:
            raise UNREACHED
        names = [path.name for path in self.remote.iterdir()]
        inside = ["onnx/model.safetensors", "model/../../x.safetensors"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in names + inside])

    def parse_safetensors_file_metadata(self, repo, name, *, revision=None):
        assert (repo, revision) == (SPEC, None)
        if self.broken:
            raise ConnectionError("reset by peer")
        self.headers.append(name)
        found = read_header(self.remote / name)
        tensors = {
            key: SimpleNamespace(
                dtype=one.dtype, shape=one.shape,
                data_offsets=(one.start - found.end, one.start + one.size - found.end),
            )
            for key, one in found.tensors.items()
        }  # fmt: skip
        return SimpleNamespace(tensors=tensors, metadata=found.metadata)

    def fetch_all(self) -> None:
        shutil.copytree(self.remote, self.snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Opened on a model's folder."""
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setattr("fpo_mlx.pipeline.doctor.gflops", lambda: 50.0)  # it is measured, and moves
    costs = importlib.import_module("fpo_mlx.pipeline.pairs_plan")  # a function has this name too
    monkeypatch.setattr(costs, "measure", lambda: Speed(50.0, 1e9, True))

    def of(remote: Path) -> Hub:
        made = Hub(remote, tmp_path / "hub")
        for name in (
            "snapshot_download", "try_to_load_from_cache", "parse_safetensors_file_metadata",
        ):  # fmt: skip
            monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        return made

    return of


def llama(root: Path) -> Path:
    return tiny_models.tiny_llama(root / "model", tokenizer=True)


def packed(root: Path) -> Path:
    """4 bits: words of uint32, scales and biases."""
    whole = tiny_models.tiny_llama(root / "model", tokenizer=True, intermediate_size=64)
    folder = quantised(whole, root / "packed")
    shutil.copy(whole / "chat_template.jinja", folder)
    return folder


def sharded(root: Path) -> Path:
    folder = llama(root)
    weights = mx.load(str(folder / "model.safetensors"))
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, name in enumerate(names):
        own = {key: weights[key] for key in sorted(weights)[n::2]}
        mx.save_safetensors(str(folder / name), own, {"format": "mlx"})
    places = {key: names[n % 2] for n, key in enumerate(sorted(weights))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    return folder


def experts(root: Path) -> Path:
    """One file tensor an expert, which mlx-lm stacks."""
    return tiny_models.tiny_mixtral(root / "model", tokenizer=True)


def multimodal(root: Path) -> Path:
    return tiny_models.tiny_gemma3(root / "model", tokenizer=True)


def figures(model: Path | str, root: Path, *words: object) -> tuple[dict, str]:
    lines(root / "data/train.jsonl", *ROWS)
    given = ["--model", model, "--data", root / "data", "--objective", "dpo", "--num-layers", 1]
    done = run("plan", *given, "--json", root / "p.json", "--overwrite", *words)
    assert done.exit_code == 0, done.output
    return json.loads((root / "p.json").read_text()), done.stderr


@pytest.mark.parametrize(
    ("make", "kind"),
    [*((make, "lora") for make in (llama, packed, sharded, experts, multimodal)), (packed, "dora")],
)
def test_a_model_of_the_hub_is_planned_by_its_headers_with_the_figures_of_its_folder(
    tmp_path, hub, make, kind
):
    folder = make(tmp_path)
    there = hub(folder)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    wanted, quiet = figures(folder, tmp_path, "--fine-tune-type", kind)
    found, said = figures(SPEC, tmp_path, "--fine-tune-type", kind)
    assert found == wanted
    assert sorted(there.headers) == weights
    assert not [name for name in there.fetched if name.endswith(".safetensors")]
    assert not list(there.snapshot.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert f"owner/model: its weights ({size / 1e6:.1f} MB in {len(weights)} file" in said
    assert "headers" not in quiet


def test_a_model_in_the_cache_is_planned_without_the_network(tmp_path, hub):
    there = hub(sharded(tmp_path))
    there.fetch_all()
    there.reachable = False
    found, said = figures(SPEC, tmp_path)
    assert found == figures(there.remote, tmp_path)[0]
    assert (there.fetched, there.headers) == ([], [])
    assert "headers" not in said


def test_of_half_a_download_the_headers_of_the_rest_are_read(tmp_path, hub):
    there = hub(sharded(tmp_path))
    there.fetch_all()
    first, second = sorted(there.snapshot.glob("*.safetensors"))
    second.unlink()
    second.symlink_to(tmp_path / "blob")  # as the cache may have it; nothing is written through it
    assert figures(SPEC, tmp_path)[0] == figures(there.remote, tmp_path)[0]
    assert there.headers == [second.name]
    assert first.is_file()
    assert not (tmp_path / "blob").exists()


@pytest.mark.parametrize(("names", "whole"), [
    ([], False), (["model.safetensors"], True), (["model-00001-of-00002.safetensors"], False),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], True),
])  # fmt: skip
def test_without_an_index_the_files_names_say_whether_one_is_missing(tmp_path, names, whole):
    for name in names:
        (tmp_path / name).touch()
    assert has_weights(tmp_path) is whole


def test_half_of_an_index_counts_as_weights_that_are_missing(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for text in ('{"weight_map": {"a"', "[]", '{"weight_map": {}}', '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert not has_weights(tmp_path), text


def test_answers_and_a_judge_of_the_hub_are_planned_by_headers_too(tmp_path, hub):
    there = hub(packed(tmp_path))
    (tmp_path / "p.txt").write_text("Why?\nWho are you?\n")
    found = []
    for model in (there.remote, SPEC):
        words = ["--model", model, "--judge", model, "--prompts", tmp_path / "p.txt"]
        words += ["--max-tokens", 8, "--json", tmp_path / "r.json", "--overwrite"]
        done = run("pairs", "plan", *words)
        assert done.exit_code == 0, done.output
        found.append(json.loads((tmp_path / "r.json").read_text()))
    assert found[0] == found[1]
    assert there.headers == ["model.safetensors"]  # once, though the model is its own judge
    assert "model.safetensors" not in there.fetched


def test_nothing_is_fetched_where_the_prompts_cannot_be_read(tmp_path, hub):
    there = hub(llama(tmp_path))
    words = ["--model", SPEC, "--prompts", tmp_path / "no.txt"]
    refused(run("pairs", "plan", *words), 1, "no.txt")
    assert (there.fetched, there.headers) == ([], [])


def plan_of_the_hub():
    return run("plan", "--model", SPEC, "--objective", "dpo")


@pytest.mark.parametrize("known", [False, True])
def test_offline_the_error_says_what_to_do(tmp_path, hub, monkeypatch, known):
    there = hub(llama(tmp_path))
    if known:  # its settings and tokenizer, as `check` leaves them
        there.fetch_all()
        (there.snapshot / "model.safetensors").unlink()
    there.reachable = False
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    what = "the headers of its weights cannot be read" if known else "neither a local folder"
    refused(
        plan_of_the_hub(), 1, what, "HF_HUB_OFFLINE keeps the hub's client off the network",
        "run without it", "hf download owner/model",
    )  # fmt: skip


def test_headers_that_do_not_come_are_a_plain_error_and_nothing_is_downloaded(tmp_path, hub):
    there = hub(llama(tmp_path))
    there.broken = True
    refused(plan_of_the_hub(), 1, "ConnectionError: reset by peer", "hf download owner/model")
    assert "model.safetensors" not in there.fetched


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.Q4_K_M.gguf", "other.safetensors"])
def test_a_repository_without_weights_that_can_be_loaded_is_refused_by_what_it_has(
    tmp_path, hub, name
):
    there = hub(llama(tmp_path))
    (there.remote / "model.safetensors").rename(there.remote / name)
    refused(plan_of_the_hub(), 1, "owner/model: found", name, "wanted model*.safetensors")
    assert name not in there.fetched


def test_a_model_that_mlx_lm_does_not_know_is_named_by_its_id(tmp_path, hub):
    there = hub(llama(tmp_path))
    path = there.remote / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nonesuch"}))
    done = plan_of_the_hub()
    refused(done, 1, "owner/model: mlx-lm cannot load this model", "nonesuch")
    assert "fpo-mlx-" not in done.stderr


@pytest.mark.parametrize("extent", [1 << 61, -1, "x"])
def test_a_header_of_extents_that_cannot_be_is_a_plain_error(tmp_path, hub, monkeypatch, extent):
    there = hub(llama(tmp_path))
    one = SimpleNamespace(dtype="F32", shape=[1], data_offsets=(0, extent))
    header = SimpleNamespace(tensors={"a": one}, metadata={})
    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", lambda *_, **__: header)
    refused(plan_of_the_hub(), 1, "the headers of its weights cannot be read")
    assert there.headers == []
