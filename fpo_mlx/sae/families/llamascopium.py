"""llamascopium (lm-saes since 2025): config.json + sae_weights.safetensors with W_E, W_D.

Formulas: llamascopium 2.0.0b34, normalize_activations() then encode(): inputs times
f = sqrt(d) / average norm; the gate sees the pre-activation times the decoder's row length n, the
features are divided by n again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import Activation, SaeWeights
from fpo_mlx.sae.common import (
    Source,
    assert_width,
    decoder_norms,
    finished,
    inverse,
    matrix,
)
from fpo_mlx.sae.hooks import site_of

FORMAT = "llamascopium"
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}


def matches(source: Source) -> bool:
    return "W_E" in source.tensors and "W_D" in source.tensors


def load(source: Source) -> SaeWeights:
    config = source.json("config.json", "hyperparams.json")
    if config is None:
        raise SaeError(f"{source.folder}: has no config.json beside {source.file.name}.")
    _refuse(config, source)
    hook_in = config.get("hook_point_in", "")
    hook_out = config.get("hook_point_out") or hook_in
    w_enc = matrix(source, "W_E")
    assert_width(w_enc.shape[0], config.get("d_model"), "d_model", source.file)
    sae = SaeWeights(
        activation=_ACTIVATIONS[config.get("act_fn", "relu")],
        w_enc=w_enc,
        b_enc=source.tensors.read("b_E"),
        w_dec=matrix(source, "W_D"),
        b_dec=source.tensors.get("b_D"),
        transcoder=hook_in != hook_out,
        site=site_of(hook_in, model_name=config.get("model_name")),
        model_name=config.get("model_name"),
        format=FORMAT,
        source=str(source.folder),
    )
    sae = _with_activation(sae, config, source)
    f_in = f_out = source.factor() or 1.0
    if source.factor() is None and config.get("norm_activation", "none") == "dataset-wise":
        f_in = np.sqrt(sae.d_in) / hook_norm(source, hook_in)
        f_out = np.sqrt(sae.d_in) / hook_norm(source, hook_out)
    gate_on_norm = bool(config.get("sparsity_include_decoder_norm", True))
    return finished(scaled_input(sae, f_in, f_out, gate_on_norm=gate_on_norm))


def scaled_input(sae: SaeWeights, f_in: float, f_out: float, *, gate_on_norm: bool) -> SaeWeights:
    """Fold x * f_in, the gate on pre * n with acts / n, and the decoder's way back to raw units."""
    assert sae.w_dec is not None
    norms = decoder_norms(sae.w_dec) if gate_on_norm else np.float32(1)  # [F]
    return replace(
        sae,
        w_enc=sae.w_enc * (np.float32(f_in) * norms),
        b_enc=sae.b_enc * norms,
        act_scale=inverse(norms) if isinstance(norms, np.ndarray) else None,
        w_dec=sae.w_dec / np.float32(f_out),
        b_dec=None if sae.b_dec is None else sae.b_dec / np.float32(f_out),
    )


def hook_norm(source: Source, hook: str) -> float:
    """The average activation norm that the weight file holds for `hook`."""
    prefix = "dataset_average_activation_norm."
    names = [name for name in source.tensors.shapes if name.startswith(prefix)]
    name = prefix + hook
    if name not in names:
        raise SaeError(
            f"{source.file}: has no average activation norm for {hook!r} "
            f"(it has: {', '.join(n.removeprefix(prefix) for n in names) or 'none'}). "
            "Give the factor on its inputs as --norm-scaling-factor."
        )
    value = source.tensors.scalar(name)
    if value <= 0:
        raise SaeError(f"{source.file}: {name} is {value}; wanted a positive number.")
    return value


def log_threshold(source: Source) -> np.ndarray | None:
    """exp of the stored log thresholds, [F]; None if the file has none."""
    for name in ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold"):
        if name in source.tensors:
            return np.exp(source.tensors.read(name))
    return None


def _with_activation(sae: SaeWeights, config: dict[str, Any], source: Source) -> SaeWeights:
    if sae.activation == "jumprelu":
        return replace(sae, threshold=log_threshold(source))
    if sae.activation == "topk":
        return replace(sae, k=source.k(config.get("top_k"), source.folder / "config.json"))
    return sae


def _refuse(config: dict[str, Any], source: Source) -> None:
    where = source.folder
    kind = config.get("sae_type", "sae")
    if kind not in ("sae", "transcoder"):
        raise SaeError(f"{where}: sae_type {kind!r} reads or writes several places; wanted sae.")
    if config.get("act_fn", "relu") not in _ACTIVATIONS:
        raise SaeError(
            f"{where}: act_fn {config['act_fn']!r} is not supported; wanted relu, jumprelu or topk "
            "(batchtopk depends on the batch: convert it to jumprelu with its own tool)."
        )
    if config.get("use_glu_encoder") or "W_E_glu" in source.tensors:
        raise SaeError(f"{where}: has a GLU encoder, which is no single matrix product.")
    norm = config.get("norm_activation", "none")
    if norm not in ("none", "dataset-wise", "inference"):
        raise SaeError(f"{where}: norm_activation {norm!r}; wanted none or dataset-wise.")
