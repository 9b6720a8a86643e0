"""Llama Scope: the lm-saes layout of 2024 and the R1-Distill layout of 2025.

2024: hyperparams.json + checkpoints/final.safetensors, one scalar threshold. The authors' encoder
(lm-saes f0058a5) gates on the pre-activation times the decoder's row length n; SAELens 6 leaves n
out, which gives another support and another scale. `llama_scope_gate` chooses.
R1-Distill: config.json + sae_weights.safetensors, a threshold per feature in log.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.common import (
    Source,
    decoder_norms,
    finished,
    inverse,
    known_factor,
    matrix,
    read_json,
    transposed,
)
from fpo_mlx.sae.families.llamascopium import hook_norm, log_threshold, scaled_input
from fpo_mlx.sae.hooks import site_of

FORMAT = "llama_scope"
SAELENS_FORMAT = "llama_scope_saelens"  # by name only: the same files, SAELens' gate
R1_FORMAT = "llama_scope_r1_distill"


def matches(source: Source) -> bool:
    return "encoder.weight" in source.tensors and _hyperparams(source) is not None


def matches_r1(source: Source) -> bool:
    return "encoder.weight" in source.tensors and log_threshold(source) is not None


def load(source: Source) -> SaeWeights:
    config = _hyperparams(source)
    if config is None:
        raise SaeError(f"{source.folder}: has no hyperparams.json, which holds the threshold.")
    _refuse(config, source)
    sae = _plain(source, config, FORMAT)
    f_in, f_out = _factors(config, source, sae.d_in)
    theta = np.full(sae.n_features, config["jump_relu_threshold"], dtype=np.float32)
    if source.options.llama_scope_gate == "saelens":
        sae = replace(
            sae,
            w_enc=sae.w_enc * f_in,
            threshold=theta * f_in,
            w_dec=_times(sae.w_dec, 1 / f_out),
            b_dec=_times(sae.b_dec, 1 / f_out),
            notes=("Gate as SAELens reads it: without the decoder norm.",),
        )
        return finished(sae)
    norms = np.ones(sae.n_features, dtype=np.float32)  # [F]
    if config.get("sparsity_include_decoder_norm", True):
        assert sae.w_dec is not None
        norms = decoder_norms(sae.w_dec)
    back = None if sae.w_dec is None else sae.w_dec * (inverse(norms) * (f_in / f_out))[:, None]
    return finished(
        replace(
            sae,
            w_enc=sae.w_enc * norms,
            b_enc=sae.b_enc * norms / f_in,
            threshold=theta,
            w_dec=back,
            b_dec=_times(sae.b_dec, 1 / f_out),
            notes=("Gate as the authors' code has it: times the decoder norm.",),
        )
    )


def load_saelens(source: Source) -> SaeWeights:
    options = replace(source.options, llama_scope_gate="saelens")
    return load(replace(source, options=options))


def load_r1(source: Source) -> SaeWeights:
    config = source.json("config.json") or {}
    _refuse(config, source)
    sae = replace(_plain(source, config, R1_FORMAT), threshold=log_threshold(source))
    f_in, f_out = _r1_factors(config, source, sae.d_in)
    with_norm = config.get("sparsity_include_decoder_norm", False)
    return finished(
        scaled_input(
            sae,
            f_in,
            f_out,
            gate_on_norm=with_norm and source.options.llama_scope_gate == "authors",
        )
    )


def _plain(source: Source, config: dict[str, Any], format: str) -> SaeWeights:
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    name = re.search(r"Llama3_1-8B-Base|R1-Distill", source.name)
    models = {"Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B"}
    models["R1-Distill"] = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return SaeWeights(
        activation="jumprelu",
        w_enc=transposed(matrix(source, "encoder.weight")),
        b_enc=source.tensors.read("encoder.bias"),
        w_dec=transposed(matrix(source, "decoder.weight")),
        b_dec=source.tensors.get("decoder.bias"),
        transcoder=hook_out not in (None, hook_in),
        site=site_of(hook_in),
        model_name=models[name[0]] if name else None,
        format=format,
        source=str(source.folder),
    )


def _refuse(config: dict[str, Any], source: Source) -> None:
    wanted = {
        "act_fn": "jumprelu",
        "use_glu_encoder": False,
        "apply_decoder_bias_to_pre_encoder": False,
    }
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise SaeError(
                f"{source.folder}: {name} is {config[name]!r}; only {value!r} is supported, as in "
                "all released Llama Scope SAEs."
            )


def _hyperparams(source: Source) -> dict[str, Any] | None:
    for folder in (source.folder, source.folder.parent):
        if (folder / "hyperparams.json").is_file():
            return read_json(folder / "hyperparams.json")
    return None


def _factors(config: dict[str, Any], source: Source, d_in: int) -> tuple[np.float32, np.float32]:
    """sqrt(d) / average activation norm, of input and output."""
    given = source.factor()
    if given is not None:
        return np.float32(given), np.float32(given)
    if config.get("norm_activation") != "dataset-wise":
        return np.float32(1), np.float32(1)
    norms = config.get("dataset_average_activation_norm") or {}
    if not norms.get("in"):
        raise SaeError(
            f"{source.folder}: hyperparams.json has no dataset_average_activation_norm.in, "
            "the scale of its inputs. Give --norm-scaling-factor."
        )
    root = np.sqrt(d_in)
    return np.float32(root / norms["in"]), np.float32(root / norms.get("out", norms["in"]))


def _r1_factors(config: dict[str, Any], source: Source, d_in: int) -> tuple[float, float]:
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0, 1.0
    stored = any(name.startswith("dataset_average_") for name in source.tensors.shapes)
    given = source.factor() if stored else known_factor(source)
    if given is not None:
        return given, given
    hook_in = config.get("hook_point_in", "")
    f_in = np.sqrt(d_in) / hook_norm(source, hook_in)
    return f_in, np.sqrt(d_in) / hook_norm(source, config.get("hook_point_out") or hook_in)


def _times(array: np.ndarray | None, factor: np.floating) -> np.ndarray | None:
    return None if array is None else array * np.float32(factor)
