"""Conversion to SAELens folders. SAELens itself is asked by scripts/checks/saelens_reads.py."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sae_files import Case, D, F
from safetensors import safe_open
from tiny_saes import CASES

from fpo_mlx.errors import FpoError, SaeError
from fpo_mlx.records import SITE_KINDS, SaeWeights, Site
from fpo_mlx.sae import convert, load_sae
from fpo_mlx.sae.encode import decode, encode
from fpo_mlx.storage import files

REFUSED = {
    "llamascopium_topk": "chooses its top k by other values",
    "sparsify_group": "SAELens has no groupmax SAE",
    "mntss": "has no decoder",
    "gemma_scope_2_clt": "has no decoder",
}
X = (np.random.default_rng(9).standard_normal((50, D)) * 3).astype(np.float32)


def opened(case: Case, folder: Path) -> SaeWeights:
    made = case.make(folder, np.random.default_rng(8))
    return load_sae(made.path, allow_pickle=True, **made.options)


def error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_survives_conversion(case: Case, tmp_path: Path):
    sae = opened(case, tmp_path / "in")
    if case.name in REFUSED:
        with pytest.raises(SaeError, match=REFUSED[case.name]):
            convert.write_saelens(sae, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    report = convert.write_saelens(sae, tmp_path / "out")
    back = load_sae(tmp_path / "out")
    acts = encode(sae, X)
    assert error_of(encode(back, X), acts) < 2e-6
    assert error_of(decode(back, acts, X), decode(sae, acts, X)) < 2e-6
    assert (back.site, back.model_name, back.transcoder) == (
        sae.site,
        sae.model_name,
        sae.transcoder,
    )
    assert report.size == (tmp_path / "out" / "sae_weights.safetensors").stat().st_size


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_every_site_survives_conversion(kind: str, tmp_path: Path):
    sae = replace(opened(CASES[0], tmp_path / "in"), site=Site(7, kind))  # type: ignore[arg-type]
    convert.write_saelens(sae, tmp_path / "out")
    assert load_sae(tmp_path / "out").site == sae.site


@pytest.mark.parametrize(
    ("dtype", "stored", "size", "bound"),
    [("float32", "F32", 4, 0), ("float16", "F16", 2, 2**-11), ("bfloat16", "BF16", 2, 2**-8)],
)
def test_a_dtype_is_stored_as_named_and_rounds_to_nearest(
    dtype: convert.SaeDtype, stored: str, size: int, bound: float, tmp_path: Path
):
    sae = opened(CASES[0], tmp_path / "in")
    convert.write_saelens(sae, tmp_path / "out", dtype)
    with safe_open(tmp_path / "out" / "sae_weights.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118
    raw = (tmp_path / "out" / "sae_weights.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert header % 8 == 0
    assert len(raw) - header == size * (2 * D * F + F + D)
    back = load_sae(tmp_path / "out")
    error = np.abs(back.w_enc - sae.w_enc)
    assert (error <= bound * np.abs(sae.w_enc)).all()
    assert (bound == 0) == (error.max() == 0)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("saelens_jumprelu", 0.02), ("saelens_gated", 0.02), ("saelens_topk", 0.15)],  # topk may swap
)
def test_eight_bits_are_within_half_a_step_of_each_feature(name: str, bound: float, tmp_path: Path):
    sae = opened(next(case for case in CASES if case.name == name), tmp_path / "in")
    convert.write_saelens(sae, tmp_path / "out", "int8")
    back = load_sae(tmp_path / "out")
    step = np.abs(sae.w_enc).max(axis=0) / 127  # one step per feature
    assert (np.abs(back.w_enc - sae.w_enc) <= step * 0.5001).all()
    assert sae.w_dec is not None
    assert back.w_dec is not None
    step = np.abs(sae.w_dec).max(axis=1, keepdims=True) / 127
    assert (np.abs(back.w_dec - sae.w_dec) <= step * 0.5001).all()
    np.testing.assert_array_equal(back.b_enc, sae.b_enc)
    acts, rough = encode(sae, X), encode(back, X)
    assert 0 < np.linalg.norm(rough - acts) / np.linalg.norm(acts) < bound


def test_a_weight_beyond_float16_is_refused_before_anything_is_written(tmp_path: Path):
    sae = opened(CASES[0], tmp_path / "in")
    sae = replace(sae, b_enc=np.full(F, 70000, np.float32))
    with pytest.raises(SaeError, match="7e.04, more than float16"):
        convert.write_saelens(sae, tmp_path / "out", "float16")
    assert not list(tmp_path.glob("out/*"))


def test_a_failed_write_leaves_the_old_sae_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sae = opened(CASES[0], tmp_path / "in")
    convert.write_saelens(sae, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FpoError, match="No space left on device"):
        convert.write_saelens(replace(sae, b_enc=sae.b_enc + 1), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_config_has_the_keys_that_saelens_6_writes(tmp_path: Path):
    case = next(case for case in CASES if case.name == "saelens_topk")
    convert.write_saelens(opened(case, tmp_path / "in"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert config["architecture"] == "topk"
    assert (config["d_in"], config["d_sae"], config["k"]) == (D, F, 5)
    assert config["apply_b_dec_to_input"] is True
    assert config["rescale_acts_by_decoder_norm"] is False
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config["metadata"]["sae_lens_version"] == "6.0.0"  # SAELens drops the metadata without
