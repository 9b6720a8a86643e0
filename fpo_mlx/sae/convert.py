"""Any SAE as a SAELens 6 folder: cfg.json + sae_weights.safetensors, and an 8-bit variant.

float32, float16 and bfloat16 are read by SAELens itself. "int8" is ours alone: W_enc and W_dec as
int8 with one float32 scale per feature (`W_enc_scale` [1, F], `W_dec_scale` [F, 1]; weight = int8 *
scale), every vector float32; SAELens stops at the unknown tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.storage import files

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
FORM = "6.0.0"  # of SAELens, whose form this is; without it the metadata are read as an older one's
SaeDtype = Literal["float32", "float16", "bfloat16", "int8"]
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOAT16_MAX = 65504.0
_ARCHITECTURES = {
    "relu": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
}
_NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm": "constant_norm_rescale",
}
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_z": "attn.hook_z",
    "attn_raw": "attn.hook_out",
    "attn_out": "hook_attn_out",
    "mlp_in_unscaled": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
    "mlp_raw": "mlp.hook_out",
    "mlp_out": "hook_mlp_out",
}
_MODULES = {"resid_post": "output", "attn_z": "self_attn.o_proj.input", "mlp_in": "mlp.input"}
_MODULES |= {"mlp_raw": "mlp.output", "attn_raw": "self_attn.output"}


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    folder: Path
    architecture: str
    dtype: str
    size: int  # bytes of the weight file


def write_saelens(
    sae: SaeWeights,
    folder: Path,
    dtype: SaeDtype = "float32",
    check: Callable[[], object] = lambda: None,
) -> ConvertReport:
    """Write `sae` so that SAELens 6 loads it (not "int8") and encodes the same.

    The folder is written whole or not at all, and what is there is replaced: whoever names it asks
    `storage.outputs` first, and by check (`files.atomic_folder`) again. Raises SaeError if SAELens
    has no such form or a weight does not fit the dtype; FpoError if it cannot be written.
    """
    if dtype not in (*_STORED, "int8"):
        raise SaeError(f"dtype {dtype!r}; wanted float32, float16, bfloat16 or int8.")
    _refuse(sae)
    tensors, subtracts = _tensors(sae)
    config = _config(sae, dtype, subtracts)
    stored = _quantized(tensors) if dtype == "int8" else _cast(tensors, dtype, sae.source)
    with files.atomic_folder(folder, check) as work:  # weights and configuration change together
        size = write_safetensors(work / WEIGHTS, stored)
        files.write_bytes(work / CONFIG, json.dumps(config, indent=1).encode())
    return ConvertReport(folder, config["architecture"], dtype, size)


def _refuse(sae: SaeWeights) -> None:
    where = sae.source or "SAE"
    if sae.activation not in _ARCHITECTURES:
        raise SaeError(f"{where}: SAELens has no {sae.activation} SAE; use the original files.")
    if sae.w_dec is None or sae.b_dec is None:
        raise SaeError(f"{where}: has no decoder, which SAELens requires; use the original files.")
    if sae.act_scale is not None and sae.activation in ("topk", "abstopk"):
        raise SaeError(
            f"{where}: chooses its top k by other values than it returns, which SAELens cannot "
            "express; use the original files."
        )
    wide = sae.transcoder and sae.activation not in ("relu", "jumprelu")
    if wide and sae.w_dec.shape[1] != sae.d_in:
        raise SaeError(f"{where}: SAELens has no {sae.activation} transcoder of two widths.")


def _tensors(sae: SaeWeights) -> tuple[dict[str, np.ndarray], bool]:
    """(SAELens' tensors, whether the encoder subtracts b_dec)."""
    assert sae.w_dec is not None
    assert sae.b_dec is not None
    w_enc, b_enc, gate_bias, threshold = sae.w_enc, sae.b_enc, sae.gate_bias, sae.threshold
    w_dec = sae.w_dec
    subtracts = sae.b_in is not None and np.array_equal(sae.b_in, sae.b_dec)
    if sae.b_in is not None and (not subtracts or sae.transcoder):
        shift = sae.b_in @ w_enc  # [F]
        subtracts = False
        b_enc = b_enc - shift * (1 if sae.gate_scale is None else sae.gate_scale)
        gate_bias = None if gate_bias is None else gate_bias - shift
    if sae.act_scale is not None:  # max(pre, 0) * s = max(pre * s, 0), as s >= 0
        scale = sae.act_scale
        w_enc, b_enc = w_enc * scale, b_enc * scale
        threshold = None if threshold is None else threshold * scale
    made = {"W_enc": w_enc, "W_dec": w_dec, "b_dec": sae.b_dec}
    if sae.activation == "gated":
        assert sae.gate_scale is not None
        assert gate_bias is not None
        return made | {
            "b_mag": b_enc,
            "b_gate": gate_bias,
            "r_mag": np.log(sae.gate_scale),
        }, subtracts
    made["b_enc"] = b_enc
    if threshold is not None:
        made["threshold"] = threshold
    return made, subtracts


def _config(sae: SaeWeights, dtype: str, subtracts: bool) -> dict[str, Any]:
    architecture = _ARCHITECTURES[sae.activation]
    if sae.transcoder:
        names = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
        architecture = names.get(architecture, architecture)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": "float32" if dtype == "int8" else dtype,
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": _NORMALIZATIONS[sae.normalize],
        "reshape_activations": "none",
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if "transcoder" in architecture and sae.w_dec is not None:
        config["d_out"] = sae.w_dec.shape[1]
    metadata: dict[str, Any] = {"model_name": sae.model_name, **_hooks(sae.site)}
    metadata["sae_lens_version"] = FORM
    metadata |= {"converted_from": sae.format, "neuronpedia_id": sae.neuronpedia}
    if sae.transcoder:
        metadata["transcoder"] = True
    if sae.centred:
        metadata["centred"] = True  # ours: SAELens gives the reconstruction without the mean
    config["metadata"] = {name: value for name, value in metadata.items() if value is not None}
    return config


def _hooks(site: Site | None) -> dict[str, str]:
    if site is None:
        return {}
    names = {"hook_name": f"blocks.{site.layer}.{_HOOKS[site.kind]}"}
    if site.kind in _MODULES:
        names["hf_hook_name"] = f"model.layers.{site.layer}.{_MODULES[site.kind]}"
    return names


def _cast(
    tensors: dict[str, np.ndarray], dtype: str, where: str
) -> dict[str, tuple[str, np.ndarray]]:
    cast = {}
    for name, array in tensors.items():
        if dtype == "float16" and np.abs(array).max(initial=0) > _FLOAT16_MAX:
            raise SaeError(
                f"{where}: {name} has a value of {np.abs(array).max():.3g}, more than float16 "
                f"holds ({_FLOAT16_MAX:.0f}). Convert to bfloat16 or float32."
            )
        if dtype == "bfloat16":
            cast[name] = (_STORED[dtype], to_bfloat16(array))
        else:
            cast[name] = (_STORED[dtype], array.astype("<f4" if dtype == "float32" else "<f2"))
    return cast


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 -> bit patterns of bfloat16 as uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _quantized(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    stored: dict[str, tuple[str, np.ndarray]] = {}
    for name, array in tensors.items():
        if array.ndim < 2:
            stored[name] = ("F32", array.astype("<f4"))
            continue
        axis = 0 if name == "W_enc" else 1  # the axis that is not features
        scale = np.abs(array).max(axis=axis, keepdims=True) / np.float32(127)
        scale = np.where(scale == 0, 1, scale).astype("<f4")
        stored[name] = ("I8", np.rint(array / scale).astype("|i1"))
        stored[f"{name}_scale"] = ("F32", scale)
    return stored


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> int:
    """Write {name: (safetensors dtype, little-endian array)} whole or not at all; bytes written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8
    parts = [len(text).to_bytes(8, "little"), text]
    arrays = [np.ascontiguousarray(array).data for _, array in tensors.values()]
    with files.atomic_path(path) as temporary, temporary.open("wb") as stream:
        for part in (*parts, *arrays):
            stream.write(part)
        return stream.tell()
