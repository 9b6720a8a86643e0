"""Spoiled files end in a documented error; scripts/checks/fuzz.py tries many more."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import forked
import numpy as np
import pytest
from launchers import environment

pytest.importorskip("mlx.core")

from fpo_mlx import cache  # noqa: E402
from fpo_mlx.config import load_config  # noqa: E402
from fpo_mlx.errors import CacheMismatch, ConfigError, ModelError, SaeError  # noqa: E402
from fpo_mlx.model.adapters import read_spec  # noqa: E402
from fpo_mlx.reference.weights import adapter_fingerprint  # noqa: E402
from fpo_mlx.sae.arrays import open_npz, open_safetensors  # noqa: E402
from fpo_mlx.storage.hub import read_config  # noqa: E402
from fpo_mlx.train.checkpoint import STATE, check_resumable  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "checks" / "fuzz.py"
DEEP = "[" * 20000


def fuzz(folder: Path, *words: str, first: str = "") -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr) of the script with these words."""
    code = (
        f"{first}\n"
        "import sys, runpy\n"
        f"sys.argv = ['fuzz.py', *{words!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return forked.start(["-c", code], folder, environment()).end(300)


def test_a_short_fuzz_of_every_reader_finds_no_fault(tmp_path):
    code, out, err = fuzz(tmp_path, "--inputs", "1500", "--seed", "3")
    assert code == 0, out + err
    assert re.search(r"^1[45]\d\d inputs, 0 faults, seed 3", out, re.MULTILINE)


def test_the_fuzzer_sees_a_foreign_exception(tmp_path):
    broken = "from fpo_mlx.storage import hub\nhub.read_config = lambda folder: {}['x']"
    words = ("--inputs", "20", "--only", "model config.json")
    code, out, _ = fuzz(tmp_path, *words, first=broken)
    assert code == 1
    assert "20 inputs, 20 faults" in out
    assert "model config.json: KeyError" in out


@pytest.mark.parametrize("text", ["3", "[]", '{"text_config": 4.5}', DEEP, "{"])
def test_a_model_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


ADAPTER = {"num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["a"]}}


@pytest.mark.parametrize(
    "spoiled",
    [4.5, {"lora_parameters": 7}, {"num_layers": float("inf")}]
    + [{"lora_parameters": {"rank": 3, "scale": 2.0, "dropout": d}} for d in ({}, "x", 1.5)]
    + [{"lora_parameters": {"rank": 3, "scale": 2.0, "keys": k}} for k in (5, "abc", [None])]
    + [{"lora_parameters": {"rank": r, "scale": s}} for r, s in ((0, 1), (1, float("nan")))],
)
def test_an_adapter_configuration_of_nonsense_is_refused(tmp_path, spoiled):
    value = {**ADAPTER, **spoiled} if isinstance(spoiled, dict) else spoiled
    (tmp_path / "adapter_config.json").write_text(json.dumps(value))
    with pytest.raises(ModelError, match="not an adapter configuration"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["objective: [fpo]", "objective: {a: 1}", "constraint: [kl]", "sae: 7", "sae: [1]",
     "sae: [null]", "seed: 2020-13-45", "alpha: .nan", "epochs: .inf", "epochs: 1e308",
     "beta: .inf", "model: !!python/object/apply:os.getcwd []", "a: " + DEEP,
     "alpha: " + "9" * 5000],
)  # fmt: skip
def test_settings_of_the_wrong_kind_are_refused(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config({}, tmp_path / "run.yaml")


def test_a_bound_may_be_infinite(tmp_path):
    (tmp_path / "run.yaml").write_text("max_margin: .inf")
    assert load_config({}, tmp_path / "run.yaml").train.max_margin == float("inf")


@pytest.mark.parametrize("text", ["[]", '{"settings": [[]], "fingerprints": {}}', DEEP, "7"])
def test_a_damaged_record_of_a_run_is_not_resumed(tmp_path, text):
    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).write_bytes(b"")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ModelError, match="is damaged"):
        check_resumable(tmp_path, {"settings": {}, "fingerprints": {}})


def test_a_manifest_nested_too_deeply_is_no_cache(tmp_path):
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(CacheMismatch, match="nested too deeply"):
        cache.read_identity(tmp_path)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "entry",
    [{"dtype": {}}, {"dtype": []}, {"shape": ["1"]}, {"shape": [2**70]}, {"shape": None},
     {"data_offsets": [None, 4]}, {"data_offsets": [0, "4"]}, {"data_offsets": [0, 4, 8]}, None],
)  # fmt: skip
def test_a_header_of_nonsense_is_refused(tmp_path, entry):
    head = json.dumps({"a": None if entry is None else {**ENTRY, **entry}}).encode()
    data = len(head).to_bytes(8, "little") + head + b"\0" * 4
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(SaeError, match=r"a\.safetensors"):
        open_safetensors(tmp_path / "a.safetensors")
    (tmp_path / "adapters.safetensors").write_bytes(data)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if entry in (None, {"shape": None}, {"data_offsets": [0, 4, 8]}):
        with pytest.raises(ModelError, match="no whole safetensors file"):
            adapter_fingerprint(tmp_path)


@pytest.mark.parametrize("place", ["name", "dtype"])
def test_half_a_character_in_a_header_is_refused(tmp_path, place):
    """A lone surrogate: JSON can hold it, no encoding can."""
    half = {"name": {"\ud800": ENTRY}, "dtype": {"a": {**ENTRY, "dtype": "\ud800"}}}[place]
    head = json.dumps(half).encode()
    data = len(head).to_bytes(8, "little") + head + b"\0" * 4
    (tmp_path / "adapters.safetensors").write_bytes(data)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(ModelError, match="no whole safetensors file"):
        adapter_fingerprint(tmp_path)


@pytest.mark.parametrize("shape", ["(99999999, 99999999)", "(", "(-1,)", "(1,) + (2,)"])
def test_an_npz_that_claims_more_than_it_has_allocates_nothing(tmp_path, shape):
    raw = io.BytesIO()
    np.save(raw, np.zeros(3, np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        text = raw.getvalue().replace(b"(3,)", shape.encode(), 1)
        archive.writestr("x.npy", text)
    with pytest.raises(SaeError, match=r"a\.npz cannot be read"):
        open_npz(tmp_path / "a.npz").read("x")
