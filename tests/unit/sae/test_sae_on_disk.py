"""SAEs whose matrices stay in their files: the same numbers, and no second copy in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import F, random_sae
from sae_files import Case, save, save_torch, write
from tiny_saes import CASES

from fpo_mlx.core import features
from fpo_mlx.core.parts import Parts
from fpo_mlx.errors import SaeError
from fpo_mlx.machine import device
from fpo_mlx.model import reader
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.records import Activation, Site
from fpo_mlx.sae import fit, load_sae, stored
from fpo_mlx.sae.common import decoder_norms
from fpo_mlx.sae.encode import decode, encode, encode_tiles
from fpo_mlx.sae.tensorfile import TensorFile

KINDS: tuple[Activation, ...] = ("relu", "jumprelu", "gated", "topk", "abstopk", "groupmax")
WIDTH, ROWS = 16, 11
HIGH, WIDE = 256, 16384  # D and F of those whose memory is measured
BYTES = 4 * WIDE * HIGH
X = np.random.default_rng(6).standard_normal((ROWS, WIDTH)).astype(np.float32) * 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_says_the_same_from_the_disk(case: Case, tmp_path: Path):
    made = case.make(tmp_path, np.random.default_rng(5))
    options = {"allow_pickle": case.pickled, **made.options}
    read, mapped = (load_sae(made.path, on_disk=there, **options) for there in (False, True))
    assert mapped.fingerprint() == read.fingerprint()
    for name in ("w_enc", "w_dec"):
        wanted, found = getattr(read, name), getattr(mapped, name)
        assert (wanted is None) is (found is None)
        if wanted is not None:
            np.testing.assert_array_equal(np.asarray(found), wanted)
    x = np.random.default_rng(6).standard_normal((7, read.d_in)).astype(np.float32)
    np.testing.assert_array_equal(encode(mapped, x), encode(read, x))


def arrays_of(rng: np.random.Generator, turned: bool = False, **more) -> dict[str, np.ndarray]:
    shapes = {"W_enc": (HIGH, WIDE), "W_dec": (WIDE, HIGH), "b_enc": (WIDE,), "b_dec": (HIGH,)}
    drawn = {k: rng.standard_normal(v) for k, v in shapes.items()} | more
    drawn = {k: v.T if turned and v.ndim == 2 else v for k, v in drawn.items()}
    return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in drawn.items()}


def gemma(folder: Path, rng: np.random.Generator) -> Path:
    """Gemma Scope's: JumpReLU, [D, F], in an archive."""
    folder = folder / "gemma-scope-2b-pt-res" / "layer_3"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays_of(rng, threshold=np.ones(WIDE)))  # type: ignore
    return folder


def batchtopk(folder: Path, rng: np.random.Generator) -> Path:
    """SAELens': the lengths of the decoder's rows are folded into the encoder."""
    write(folder, "cfg.json", {"architecture": "batchtopk", "d_in": HIGH, "d_sae": WIDE})
    save(folder, "sae_weights.safetensors", arrays_of(rng, topk_threshold=np.array(1.5)))
    return folder


def half(folder: Path, rng: np.random.Generator) -> Path:
    """sparsify's TopK, [F, D], in bfloat16."""
    write(folder, "cfg.json", {"k": 8, "d_in": HIGH})
    arrays = arrays_of(rng)
    arrays["encoder.weight"] = arrays.pop("W_enc").T
    arrays["encoder.bias"] = arrays.pop("b_enc")
    tensors = {name: mx.array(array).astype(mx.bfloat16) for name, array in arrays.items()}
    mx.save_safetensors(str(folder / "sae.safetensors"), tensors)
    return folder


def qwen(folder: Path, rng: np.random.Generator) -> Path:
    """Qwen-Scope's TopK, [F, D], pickled."""
    return save_torch(
        folder / "SAE-Res-Qwen3-W16K-L0_8" / "layer3.sae.pt", arrays_of(rng, turned=True)
    )


@pytest.mark.parametrize("make", [gemma, batchtopk, half, qwen])
def test_an_encoder_goes_from_its_file_into_one_array_of_the_device(
    make: Callable[[Path, np.random.Generator], Path], tmp_path: Path, monkeypatch
):
    """By blocks of a 64th: what numpy and MLX hold beside the encoder is a tenth at most."""
    place = make(tmp_path, np.random.default_rng(7))
    wanted = load_sae(place, allow_pickle=True, decoder=False)
    monkeypatch.setattr(stored, "BLOCK", BYTES // 4 // 64)
    monkeypatch.setattr(reader, "FILLED", BYTES // 4 // 64)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    sae = load_sae(place, allow_pickle=True, decoder=False, on_disk=True)
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    encoder = encoder_of(sae)
    filling, on_device = tracemalloc.get_traced_memory()[1], mx.get_peak_memory() - before
    tracemalloc.stop()
    assert isinstance(sae.w_enc, stored.Stored)
    assert isinstance(encoder.w_enc, mx.array)
    np.testing.assert_array_equal(np.array(encoder.w_enc), wanted.w_enc.T)
    assert loading <= 0.1 * BYTES
    assert filling + on_device <= 1.1 * BYTES


LEARNED = [case for case in CASES if case.format == "dictionary_learning"]


@pytest.mark.parametrize("case", LEARNED, ids=lambda case: case.name)
def test_a_decoder_that_is_left_out_is_not_read(case, tmp_path: Path, monkeypatch):
    made, seen, read = case.make(tmp_path, np.random.default_rng(0)), [], TensorFile.read
    options = {"allow_pickle": case.pickled, **made.options}
    monkeypatch.setattr(TensorFile, "read", lambda self, n: (seen.append(n), read(self, n))[1])
    whole = load_sae(made.path, **options)
    assert {"decoder.weight", "W_dec"} & set(seen)
    seen.clear()
    half = load_sae(made.path, decoder=False, **options)
    assert seen
    assert not {"decoder.weight", "W_dec"} & set(seen)
    assert half.w_dec is None
    assert half.fingerprint() == whole.fingerprint()


def test_a_value_that_is_not_finite_is_found_on_the_disk(tmp_path: Path):
    arrays = arrays_of(np.random.default_rng(8), topk_threshold=np.array(1.0))
    arrays["W_enc"][3, 5] = np.nan
    write(tmp_path, "cfg.json", {"architecture": "batchtopk", "d_in": HIGH, "d_sae": WIDE})
    save(tmp_path, "sae_weights.safetensors", arrays)
    with pytest.raises(SaeError, match="'W_enc' has 1 of"):
        load_sae(tmp_path, on_disk=True)


def test_a_damaged_archive_is_refused_from_the_disk_too(tmp_path: Path):
    place = gemma(tmp_path, np.random.default_rng(9)) / "params.npz"
    raw = bytearray(place.read_bytes())
    raw[1000] ^= 1
    place.write_bytes(raw)
    with pytest.raises(SaeError, match="cannot be read"):
        load_sae(place, on_disk=True)


@pytest.mark.parametrize("key", [3, [4, 1], slice(2, 5), (slice(1, 9), slice(2, 4))])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_of_a_scaled_matrix_are_those_of_the_array(turned: bool, key):
    raw = np.random.default_rng(11).standard_normal((12, 5)).astype(np.float32)
    wide, high = np.arange(1, 6, dtype=np.float32), np.arange(1, 13, dtype=np.float32)[:, None]
    plain = raw * wide / high * np.float32(0.5)
    made = stored.Stored.of(raw, lambda values: values) * wide / high * np.float32(0.5)
    if turned:
        plain, made = plain.T, made.T
    np.testing.assert_array_equal(made[key], plain[key])
    np.testing.assert_array_equal(np.array(made), plain)
    np.testing.assert_array_equal(np.eye(len(plain), dtype=np.float32) @ made, plain)


@pytest.mark.parametrize("turned", [False, True])
def test_lengths_of_rows_are_the_same_to_the_bit_by_blocks(turned: bool, monkeypatch):
    """They go into fingerprints, so a cache must be found again."""
    w_dec = np.random.default_rng(10).standard_normal((322, 70)).astype(np.float32)
    w_dec = np.asfortranarray(w_dec) if turned else w_dec
    monkeypatch.setattr(stored, "BLOCK", 70)
    np.testing.assert_array_equal(decoder_norms(w_dec), np.linalg.norm(w_dec, axis=1))


def sae_of(kind: Activation):
    scale = np.linspace(0.5, 2, F, dtype=np.float32)
    made = random_sae(kind, WIDTH, Site(0))
    decoder = np.random.default_rng(4).standard_normal((F, WIDTH)).astype(np.float32)
    return replace(made, act_scale=scale, w_dec=decoder, b_dec=np.ones(WIDTH, np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 5, 20, F, 1000])
def test_tiles_of_features_are_the_whole_encoding(kind: Activation, width: int):
    sae = sae_of(kind)
    tiles = list(encode_tiles(sae, X, width))
    assert [tile.start for tile, _ in tiles] == sorted({tile.start for tile, _ in tiles})
    assert (len(tiles) > 1) is (width < F)
    found = np.concatenate([part for _, part in tiles], axis=1)
    np.testing.assert_allclose(found, encode(sae, X), atol=1e-6, rtol=1e-6)
    assert (found != 0).any(axis=1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_is_judged_by_tiles_as_at_once(kind: Activation, monkeypatch):
    sae = sae_of(kind)
    recon = decode(sae, encode(sae, X), X).astype(np.float64)
    for elements in (1 << 24, 7 * ROWS):
        monkeypatch.setattr(fit, "_ELEMENTS", elements)
        sums = fit.measure(sae, X)
        assert sums.r is not None
        np.testing.assert_allclose(sums.r, recon.sum(axis=0), rtol=1e-5)
        np.testing.assert_allclose(sums.error, ((X - recon) ** 2).sum(), rtol=1e-5)
        np.testing.assert_array_equal(sums.active, (encode(sae, X) != 0).sum(axis=0))


# An encoder that one buffer does not hold ---------------------------------------------------------


def in_parts(kind: Activation, features_each: int) -> features.Encoder:
    limit = 4 * WIDTH * features_each + 3
    with device.using(replace(device.here(), buffer_limit=limit)):
        encoder = encoder_of(sae_of(kind))
    assert isinstance(encoder.w_enc, Parts)
    assert all(array.nbytes <= limit for array in encoder.w_enc.arrays)
    return encoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 8, F])
def test_an_encoder_in_several_buffers_pools_the_same(kind: Activation, tile: int, monkeypatch):
    monkeypatch.setattr(features, "LEAST_TILE", tile)
    small = replace(device.here(), pool_elements=1, top_elements=1)
    weights = np.zeros((2, ROWS), np.float32)
    weights[0, :4], weights[1, 4:] = 1 / 4, 1 / 7
    parts, whole = in_parts(kind, 20), encoder_of(sae_of(kind))
    with device.using(small):
        (found, gate), (wanted, other) = (
            features.pool(one, mx.array(X), mx.array(weights)) for one in (parts, whole)
        )
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-6)
    indices, cotangent = mx.array([0, 47, 12, 13, 31, 20]), mx.array([1.0, -2, 0.5, 3, 1.5, -1])
    assert (gate is None) is (other is None)

    def some(encoder, gates):
        return lambda rows: (
            features.selected_means(encoder, rows, gates, indices) * cotangent
        ).sum()

    (a, da), (b, db) = (
        mx.value_and_grad(some(*one))(mx.array(X)) for one in ((parts, gate), (whole, other))
    )
    np.testing.assert_allclose(a.item(), b.item(), atol=1e-6)
    np.testing.assert_allclose(np.array(da), np.array(db), atol=1e-6)
    np.testing.assert_allclose(
        np.array(features.encode(parts, mx.array(X))), encode(sae_of(kind), X), atol=1e-5
    )


def test_rows_of_parts_are_those_of_the_whole():
    whole = mx.array(np.arange(33, dtype=np.float32).reshape(11, 3))
    parts = Parts([whole[:4], whole[4:5], whole[5:]])
    assert parts.shape == (11, 3)
    assert [(own.start, own.stop) for own in parts.slices()] == [(0, 4), (4, 5), (5, 11)]
    indices = mx.array([10, 0, 4, 3, 5, 4])
    assert parts.take(indices).tolist() == whole[indices].tolist()
    for start in range(11):
        for stop in range(start + 1, 12):
            assert parts[start:stop].tolist() == whole[start:stop].tolist()


def test_metals_record_knows_the_largest_buffer(monkeypatch):
    monkeypatch.setattr(device, "backend", lambda: "metal")
    about = {"max_recommended_working_set_size": 11_453_251_584, "max_buffer_length": 8_589_934_592}
    monkeypatch.setattr(device, "info", lambda: about)
    assert device._find().buffer_limit == 8_589_934_592
    assert device.gpu("cuda", 80e9).buffer_limit is None
