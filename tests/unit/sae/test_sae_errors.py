"""Files that must not be read: damaged, hostile, or of a form that is not supported."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_files import Case, D, F, K, Made, save_torch
from safetensors.numpy import load_file, save_file
from tiny_saes import CASES

from fpo_mlx.errors import SaeError
from fpo_mlx.sae import FORMATS, load_sae
from fpo_mlx.sae.arrays import open_tensors


def made(name: str, folder: Path) -> Made:
    case = next(case for case in CASES if case.name == name)
    return case.make(folder, np.random.default_rng(0))


def changed(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace (or with None, remove) tensors of a SAELens folder."""
    path = folder / "sae_weights.safetensors"
    weights = {**load_file(path), **tensors}
    save_file({k: v for k, v in weights.items() if v is not None}, path)


def configured(folder: Path, **values: object) -> None:
    config = json.loads((folder / "cfg.json").read_text()) | values
    (folder / "cfg.json").write_text(json.dumps(config))


def test_a_missing_path_is_named(tmp_path: Path):
    with pytest.raises(SaeError, match="nowhere: no such file"):
        load_sae(tmp_path / "nowhere")


def test_a_folder_without_weights_says_what_was_wanted(tmp_path: Path):
    with pytest.raises(SaeError, match=r"no SAE weights \(\.safetensors"):
        load_sae(tmp_path)


def test_two_saes_in_one_folder_are_listed(tmp_path: Path):
    made("saelens_standard", tmp_path / "a")
    made("saelens_topk", tmp_path / "b")
    with pytest.raises(SaeError, match=r"holds 2 SAEs(.|\n)*a/sae_weights(.|\n)*b/sae_weights"):
        load_sae(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.99])
@pytest.mark.parametrize("name", ["saelens_jumprelu", "gemma_scope_res", "qwen_scope"])
def test_a_truncated_file_is_refused_in_plain_text(name: str, part: float, tmp_path: Path):
    made(name, tmp_path)
    file = next(f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".npz", ".pt"))
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(
        SaeError, match=r"is truncated: tensor|cannot be read: wanted|\.pt: .*Wanted a zip"
    ):
        load_sae(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["W_enc", "b_enc", "threshold", "b_dec"])
def test_weights_that_are_not_finite_are_counted(tensor: str, value: float, tmp_path: Path):
    made("saelens_jumprelu", tmp_path)
    array = load_file(tmp_path / "sae_weights.safetensors")[tensor]
    array.reshape(-1)[:2] = value
    changed(tmp_path, **{tensor: array})
    with pytest.raises(SaeError, match=f"'{tensor}' has 2 of {array.size} values that are NaN"):
        load_sae(tmp_path)


@pytest.mark.parametrize("k", [0, -1, 2.5, "8", True, None, F + 1])
def test_an_impossible_k_is_refused(k: object, tmp_path: Path):
    made("saelens_topk", tmp_path)
    configured(tmp_path, k=k)
    with pytest.raises(SaeError, match="k is "):
        load_sae(tmp_path)


def test_a_threshold_of_the_wrong_length_is_refused(tmp_path: Path):
    made("saelens_jumprelu", tmp_path)
    changed(tmp_path, threshold=np.ones(F - 1, np.float32))
    with pytest.raises(SaeError, match=rf"threshold has shape \[{F - 1}\]; wanted \[{F}\]"):
        load_sae(tmp_path)


def test_a_scalar_threshold_is_not_stretched(tmp_path: Path):
    made("saelens_jumprelu", tmp_path)
    changed(tmp_path, threshold=np.array(1, dtype=np.float32))
    with pytest.raises(SaeError, match="threshold has shape"):
        load_sae(tmp_path)


def test_a_missing_tensor_is_named_with_those_that_are_there(tmp_path: Path):
    made("saelens_jumprelu", tmp_path)
    changed(tmp_path, threshold=None)
    with pytest.raises(SaeError, match="no tensor 'threshold'; it holds W_dec, W_enc"):
        load_sae(tmp_path)


@pytest.mark.parametrize(("name", "key"), [("d_in", D + 1), ("d_sae", F - 1)])
def test_a_config_of_another_sae_is_refused(name: str, key: int, tmp_path: Path):
    made("saelens_standard", tmp_path)
    configured(tmp_path, **{name: key})
    with pytest.raises(SaeError, match=f"{name} = {key}, the weights have"):
        load_sae(tmp_path)


def test_groups_must_divide_the_features(tmp_path: Path):
    case = made("sparsify_group", tmp_path)
    configured(case.path, k=7)
    with pytest.raises(SaeError, match="do not split into 7 groups"):
        load_sae(case.path)


REFUSALS = [
    ("saelens_standard", {"architecture": "matching_pursuit"}, "iterative search"),
    ("saelens_standard", {"architecture": "temporal"}, "whole sequence"),
    ("saelens_standard", {"architecture": "brand_new"}, "architecture 'brand_new'"),
    ("saelens_pre6", {"activation_fn_str": "tanh-relu"}, "activation is 'tanh-relu'"),
    ("saelens_pre6", {"activation_fn_str": "topk"}, "would give wrong features"),
    ("saelens_standard", {"normalize_activations": "whitening"}, "normalize_activations is"),
    ("saelens_transcoder", {"apply_b_dec_to_input": True}, "belongs to another place"),
]


@pytest.mark.parametrize(("name", "values", "reason"), REFUSALS)
def test_what_cannot_be_read_rightly_is_refused_with_the_reason(
    name: str, values: dict, reason: str, tmp_path: Path
):
    made(name, tmp_path)
    configured(tmp_path, **values)
    with pytest.raises(SaeError, match=reason):
        load_sae(tmp_path)


def test_a_scaling_factor_of_ones_is_dropped_and_any_other_refused(tmp_path: Path):
    made("saelens_pre6", tmp_path)
    plain = load_sae(tmp_path).fingerprint()
    changed(tmp_path, scaling_factor=np.ones(F, np.float32))
    assert load_sae(tmp_path).fingerprint() == plain
    changed(tmp_path, scaling_factor=np.full(F, 1.5, np.float32))
    with pytest.raises(SaeError, match="scaling_factor other than 1"):
        load_sae(tmp_path)


def test_the_embedding_sae_is_refused(tmp_path: Path):
    place = tmp_path / "embedding" / "width_4k" / "average_l0_6"
    made("gemma_scope_res", tmp_path / "x").path.rename(tmp_path / "moved")
    place.parent.mkdir(parents=True)
    (tmp_path / "moved").rename(place)
    with pytest.raises(SaeError, match="token embeddings"):
        load_sae(place)


def test_a_crosscoder_and_a_temporal_sae_are_refused(tmp_path: Path):
    shape = np.zeros((3, D, F), np.float32)
    (tmp_path / "c").mkdir()
    save_file({"w_enc": shape, "w_dec": shape}, tmp_path / "c" / "params.safetensors")
    with pytest.raises(SaeError, match="is a crosscoder"):
        load_sae(tmp_path / "c")
    (tmp_path / "t").mkdir()
    parts = {"D": np.zeros((F, D), np.float32), "attn_layers.0.k_ctx.bias": np.zeros(4, np.float32)}
    save_file(parts, tmp_path / "t" / "latest_ckpt.safetensors")
    with pytest.raises(SaeError, match="temporal SAE"):
        load_sae(tmp_path / "t")


def test_an_unknown_layout_shows_its_tensors(tmp_path: Path):
    save_file({"lora_a": np.zeros((2, 2), np.float32)}, tmp_path / "adapters.safetensors")
    with pytest.raises(SaeError, match="its tensors are lora_a"):
        load_sae(tmp_path)


def test_an_unknown_format_name_shows_the_known_ones(tmp_path: Path):
    made("saelens_standard", tmp_path)
    with pytest.raises(SaeError, match="'sealens' is unknown; wanted one of saelens, gemma_scope"):
        load_sae(tmp_path, format="sealens")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_another_familys_format_never_ends_in_a_traceback(case: Case, tmp_path: Path):
    path = case.make(tmp_path, np.random.default_rng(0)).path
    for format in FORMATS:
        message = str(tmp_path)
        try:
            load_sae(path, format=format, allow_pickle=True)
        except SaeError as error:
            message = str(error)
        assert str(tmp_path) in message


def test_qwen_scope_without_its_repository_name_asks_for_k(tmp_path: Path):
    case = made("qwen_scope", tmp_path)
    moved = tmp_path / case.path.name
    case.path.rename(moved)
    with pytest.raises(SaeError, match="k is not in the file.*--sae-k"):
        load_sae(moved, allow_pickle=True)
    assert load_sae(moved, allow_pickle=True, k=5).k == 5
    assert load_sae(moved, allow_pickle=True, name="Qwen/SAE-Res-Qwen3-W32K-L0_7").k == 7


def without_k(name: str, folder: Path) -> Path:
    """A case's SAE whose files do not hold k; in a folder whose name does not either."""
    case = made(name, folder)
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        trainer = config.get("trainer", {})
        for part in (config, trainer, config.get("activation_fn_kwargs", {})):
            for key in ("k", "top_k"):
                part.pop(key, None)
        file.write_text(json.dumps(config))
    if case.path.suffix != ".pt":
        return case.path
    tree = read_back(case.path)
    tree.get("activation_state_dict", {}).pop("k", None)
    return save_torch(folder / "plain" / case.path.name, tree)


def read_back(path: Path) -> dict:
    file = open_tensors(path, allow_pickle=True)
    return {name: file.read(name) for name in file.shapes} | dict(file.extras)


WITHOUT_K = ["openai", "qwen_scope", "sparsify_topk", "llamascopium_topk", "saelens_topk"]


@pytest.mark.parametrize("name", [*WITHOUT_K, "saelens_pre6_topk"])
def test_a_topk_sae_whose_files_hold_no_k_is_read_with_the_users(name: str, tmp_path: Path):
    case, path = made(name, tmp_path / "whole"), without_k(name, tmp_path / "bare")
    with pytest.raises(SaeError, match="--sae-k"):
        load_sae(path, allow_pickle=True)
    whole = load_sae(case.path, allow_pickle=True)
    bare = load_sae(path, allow_pickle=True, k=K)
    assert bare.fingerprint() == whole.fingerprint()
    assert load_sae(path, allow_pickle=True, k=K + 1).fingerprint() != whole.fingerprint()
    with pytest.raises(SaeError, match="k is 0; wanted a whole number"):
        load_sae(path, allow_pickle=True, k=0)


IDLE = [
    ("gemma_scope_res", {"k": 4}, "--sae-k says nothing to a gemma_scope SAE"),
    ("saelens_jumprelu", {"k": 4}, "a jumprelu SAE, which has no k"),
    ("sparsify_topk", {"norm_scaling_factor": 2.0}, "--norm-scaling-factor says nothing"),
    ("saelens_topk", {"norm_scaling_factor": 2.0}, "were not scaled by an average norm"),
    ("saelens_topk", {"llama_scope_gate": "saelens"}, "--llama-scope-gate says nothing"),
]


@pytest.mark.parametrize(("name", "options", "reason"), IDLE)
def test_a_reading_that_would_change_nothing_is_refused(
    name: str, options: dict, reason: str, tmp_path: Path
):
    case = made(name, tmp_path)
    with pytest.raises(SaeError, match=reason):
        load_sae(case.path, **options)


def test_an_object_array_in_an_npz_is_not_unpickled(tmp_path: Path):
    case = made("gemma_scope_res", tmp_path)
    with np.load(case.path / "params.npz") as archive:
        arrays = dict(archive)
    arrays["W_enc"] = np.array([Bomb(tmp_path / "ran")], dtype=object)
    np.savez(case.path / "params.npz", **arrays)
    with pytest.raises(SaeError, match="cannot be read: wanted"):
        load_sae(case.path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Makes a file when unpickled by a loader that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_bomb_goes_off_in_a_plain_unpickler(tmp_path: Path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


HOSTILE = {
    "exit": b"\x80\x02csys\nexit\n(K\x07tR.",
    "eval": b"\x80\x02cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n(ctorch\nSize\nX\x08\x00\x00\x00__self__tR.",
    "call a type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "set attributes": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00ak\x01sb.",
    "memory": b"\x80\x02ctorch\nFloatStorage\nX\x01\x00\x00\x00a\x86Q.",
    "endless stack": b"\x80\x02" + b"(" * 5000 + b".",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_harmless(name: str, tmp_path: Path):
    path = save_torch(tmp_path / "ae.pt", {}, pickled=HOSTILE[name] or b"\x80\x02")
    with pytest.raises(SaeError, match="is refused: |wanted a dictionary of tensors"):
        load_sae(path, allow_pickle=True)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_reduce_beside_real_tensors_does_nothing(protocol: int, tmp_path: Path):
    bomb = pickle.dumps({"weights": [Bomb(tmp_path / "ran")]}, protocol=protocol)
    path = save_torch(tmp_path / "ae.pt", {"W_enc": np.ones((2, 3), np.float32)}, pickled=bomb)
    with pytest.raises(SaeError, match=r"asks for \w+\.mkdir, which is no tensor"):
        load_sae(path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path):
    tree = {"W_enc": np.ones((F, D), np.float32), "W_dec": np.ones((D, F), np.float32)}
    tree |= {"b_enc": np.ones(F, np.float32), "b_dec": np.ones(D, np.float32)}
    path = save_torch(tmp_path / "layer3.sae.pt", tree)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["archive/data/0"] = parts["archive/data/0"][:-4]
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in parts.items():
            archive.writestr(name, raw)
    with pytest.raises(SaeError, match="its storage has"):
        load_sae(path, allow_pickle=True, k=3)


def test_a_compressed_torch_file_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * 10_000)
    with pytest.raises(SaeError, match="compressed or too large"):
        load_sae(tmp_path, allow_pickle=True)


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_header_never_escapes_as_another_exception(data: st.DataObject, tmp_path_factory):
    """Flipped bytes give the SAE, other numbers, or an SaeError: never a traceback."""
    folder = tmp_path_factory.mktemp("damaged")
    made("saelens_jumprelu", folder)
    file = folder / "sae_weights.safetensors"
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    message = str(folder)
    try:
        load_sae(folder)
    except SaeError as error:
        message = str(error)
    assert str(folder) in message


JUNK = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3) | st.just({}) | st.just([])
)


@settings(max_examples=200)
@given(data=st.data())
def test_a_config_of_nonsense_never_ends_in_a_traceback(data: st.DataObject, tmp_path_factory):
    names = [case.name for case in CASES if not case.pickled]
    folder = tmp_path_factory.mktemp("nonsense")
    made(data.draw(st.sampled_from(names)), folder)
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        key = data.draw(st.sampled_from(sorted(config)))
        config[key] = data.draw(JUNK)
        file.write_text(json.dumps(config))
    message = str(folder)
    try:
        load_sae(folder)
    except SaeError as error:
        message = str(error)
    assert str(folder) in message
