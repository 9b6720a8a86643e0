"""dictionary_learning: FOLDER/{ae.pt,config.json}; the class named in config.json decides.

Formulas: dictionary_learning 0.1.0, dictionary.py and trainers/*.py. Final files take raw inputs;
a training backup ({"ae": …, "norm_factor": …}) was left in units of x / norm_factor.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.common import Source, assert_width, finished, matrix, transposed
from fpo_mlx.sae.hooks import site_of

FORMAT = "dictionary_learning"
# name of the decoder bias, and whether the encoder subtracts it
_CLASSES: dict[str, tuple[str, bool]] = {
    "AutoEncoder": ("bias", True),
    "AutoEncoderNew": ("decoder.bias", False),
    "GatedAutoEncoder": ("decoder_bias", True),
    "AutoEncoderTopK": ("b_dec", True),
    "BatchTopKSAE": ("b_dec", True),
    "MatryoshkaBatchTopKSAE": ("b_dec", True),
    "JumpReluAutoEncoder": ("b_dec", False),
}


def matches(source: Source) -> bool:
    config = source.json("config.json") or {}
    return "trainer" in config or (source.file.name == "ae.pt" and _class_by_tensors(source) != "")


def load(source: Source) -> SaeWeights:
    config = source.json("config.json") or {}
    trainer = config.get("trainer") or {}
    name = _class(source, trainer)
    bias, subtracted = _CLASSES[name]
    tensors = source.tensors
    linear = "encoder.weight" in tensors
    w_enc = matrix(source, "encoder.weight" if linear else "W_enc")
    w_enc = transposed(w_enc) if linear else w_enc
    assert_width(w_enc.shape[0], trainer.get("activation_dim"), "activation_dim", source.file)
    assert_width(w_enc.shape[1], trainer.get("dict_size"), "dict_size", source.file)
    b_dec = tensors.read(bias)
    encoder_bias = "mag_bias" if name == "GatedAutoEncoder" else "encoder.bias"
    sae = SaeWeights(
        activation="relu",
        w_enc=w_enc,
        b_enc=tensors.read(encoder_bias if linear else "b_enc"),
        b_in=b_dec if subtracted else None,
        w_dec=_decoder(source, linear) if source.options.decoder else None,
        b_dec=b_dec,
        site=site_of(trainer.get("submodule_name"), model_name=trainer.get("lm_name"))
        or _site_in_path(source),
        model_name=trainer.get("lm_name"),
        format=FORMAT,
        source=str(source.folder),
    )
    sae = _with_activation(sae, name, source, trainer)
    return finished(_raw_units(sae, tensors.extras.get("norm_factor")))


def _decoder(source: Source, linear: bool) -> np.ndarray:
    return transposed(matrix(source, "decoder.weight")) if linear else matrix(source, "W_dec")


def _class(source: Source, trainer: dict[str, Any]) -> str:
    name = trainer.get("dict_class") or _class_by_tensors(source)
    if name not in _CLASSES:
        raise SaeError(
            f"{source.folder}: dictionary class {name or 'unknown'!r}; wanted one of "
            f"{', '.join(_CLASSES)}, named in config.json as trainer.dict_class."
        )
    return name


def _class_by_tensors(source: Source) -> str:
    """The class whose tensors these are, "" where two classes share a layout."""
    shapes = source.tensors.shapes
    if "W_enc" in shapes and "threshold" in shapes:
        return "MatryoshkaBatchTopKSAE" if shapes["threshold"] == () else "JumpReluAutoEncoder"
    if "decoder_bias" in shapes:
        return "GatedAutoEncoder"
    if "encoder.weight" in shapes and "bias" in shapes:
        return "AutoEncoder"
    return ""


def _site_in_path(source: Source):
    names = [part for part in source.folder.parts if re.fullmatch(r"\w+_layer_?\d+", part)]
    return site_of(names[-1]) if names else None


def _with_activation(
    sae: SaeWeights, name: str, source: Source, trainer: dict[str, Any]
) -> SaeWeights:
    tensors = source.tensors
    if name == "GatedAutoEncoder":
        scale, gate = np.exp(tensors.read("r_mag")), tensors.read("gate_bias")
        return replace(sae, activation="gated", gate_scale=scale, gate_bias=gate)
    if name == "AutoEncoderTopK":  # its stored threshold is not used by encode
        k = tensors.scalar("k") if "k" in tensors else trainer.get("k")
        return replace(sae, activation="topk", k=source.k(k, source.file))
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):  # their stored k is not used by encode
        value = tensors.scalar("threshold")
        threshold = np.full(sae.n_features, value, dtype=np.float32)
        notes = sae.notes
        if value < 0:
            notes = ("The threshold was never trained (-1): every positive feature counts.",)
        return replace(sae, activation="jumprelu", threshold=threshold, notes=notes)
    if name == "JumpReluAutoEncoder":
        return replace(sae, activation="jumprelu", threshold=tensors.read("threshold"))
    return sae


def _raw_units(sae: SaeWeights, norm_factor: Any) -> SaeWeights:
    """A training backup works on x / norm_factor: scale biases and thresholds to raw x."""
    if norm_factor is None or float(norm_factor) == 1:
        return sae
    f = np.float32(norm_factor)
    names = ("b_enc", "b_in", "b_dec", "gate_bias", "threshold")
    scaled = {name: value * f for name in names if (value := getattr(sae, name)) is not None}
    return replace(sae, **scaled)
