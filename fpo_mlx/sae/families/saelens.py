"""SAELens folders: cfg.json + sae_weights.safetensors, versions 3 to 6.

Formulas: SAELens 6.54.12, saes/*.py. Version 6 nests the hook under `metadata`; 3 to 5 are flat.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import AFTER_ATTENTION, Normalization, SaeWeights, Site
from fpo_mlx.sae.common import (
    Source,
    assert_width,
    decoder_norms,
    finished,
    inverse,
    known_factor,
    matrix,
)
from fpo_mlx.sae.hooks import site_of

FORMAT = "saelens"
TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", *TRANSCODERS)
REFUSED = {
    "matching_pursuit": "its encoder is an iterative search, no function with a usable gradient",
    "temporal": "it encodes a whole sequence at once, not one token",
}
# what SAELens' own table of releases adds to the files of these repositories
_OVERRIDES: dict[str, dict[str, Any]] = {
    "Mistral-7B-Residual-Stream-SAEs": {"normalize_activations": "constant_norm_rescale"},
    "GPT2-Small-SAEs-Reformatted": {"center_writing_weights": True},
    "gpt2-small-mlp-out-saes": {"center_writing_weights": True},
}
# places whose mean over D is 0 once the weights that write to them are centred
_WRITTEN = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")


def matches(source: Source) -> bool:
    config = source.json("cfg.json") if source.file.name == "sae_weights.safetensors" else None
    return config is not None and "W_dec" in source.tensors


def load(source: Source) -> SaeWeights:
    """Every SAELens architecture whose encoder is one matrix product per token."""
    config = flat_config(source)
    architecture = _architecture(config, source)
    base = TRANSCODERS.get(architecture, architecture)
    notes = list(_refuse_scaling_factor(source))
    w_enc, w_dec = matrix(source, "W_enc"), _decoder(source, config, base)
    assert_width(w_enc.shape[0], config.get("d_in"), "d_in", source.file)
    assert_width(w_enc.shape[1], config.get("d_sae"), "d_sae", source.file)
    sae = SaeWeights(
        activation="relu",
        w_enc=w_enc,
        b_enc=source.tensors.first("b_mag" if base == "gated" else "b_enc"),
        b_in=_subtracted_bias(source, config, architecture),
        normalize=_normalization(config, source),
        w_dec=w_dec,
        b_dec=source.tensors.get("b_dec"),
        centred=bool(config.get("centred")),
        transcoder=architecture in TRANSCODERS or bool(config.get("transcoder")),
        site=_site(config),
        model_name=config.get("model_name"),
        format=FORMAT,
        source=str(source.folder),
        neuronpedia=config.get("neuronpedia_id"),
    )
    sae = _with_activation(sae, base, config, source)
    if "skip" in architecture:
        notes.append("The skip connection is not used: it does not enter the features.")
    sae, scaled = _fold_average(sae, config, source)
    sae, centred = _fold_centring(sae, config)
    return finished(replace(sae, notes=tuple([*notes, *scaled, *centred])))


def flat_config(source: Source) -> dict[str, Any]:
    """cfg.json with `metadata` lifted to the top, and the release table's own additions."""
    config = source.json("cfg.json")
    if config is None:
        raise SaeError(f"{source.folder}: has no cfg.json beside {source.file.name}.")
    metadata = config.get("metadata") or {}
    overrides = [extra for name, extra in _OVERRIDES.items() if name in source.name]
    flat = {**metadata, **{k: v for k, v in config.items() if k != "metadata"}}
    for extra in overrides:
        flat.update(extra)
    return flat


def _architecture(config: dict[str, Any], source: Source) -> str:
    name = config.get("architecture") or "standard"
    where = source.folder / "cfg.json"
    if name.startswith("matryoshka"):
        name = "batchtopk"  # the inner widths shape training only
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    k = (config.get("activation_fn_kwargs") or {}).get("k", source.options.k)
    if name == "standard" and activation == "topk" and k is not None:
        name = "topk"
    if name in ("topk", "abstopk") and config.get("k") is None:  # version 5 has it there
        config["k"] = k
    if name == "standard" and activation != "relu":
        raise SaeError(
            f"{where}: the activation is {activation!r} (k: {k}); wanted relu, or topk with "
            "activation_fn_kwargs.k or --sae-k. Reading it as a ReLU SAE would give wrong features."
        )
    if name in REFUSED:
        raise SaeError(f"{where}: {name} SAEs are not supported: {REFUSED[name]}.")
    if name not in ARCHITECTURES:
        raise SaeError(f"{where}: architecture {name!r}; wanted one of {', '.join(ARCHITECTURES)}.")
    return name


def _decoder(source: Source, config: dict[str, Any], base: str) -> np.ndarray | None:
    """W_dec, if it is wanted or if its row lengths enter the encoder."""
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    if source.options.decoder or base == "batchtopk" or rescaled:
        return matrix(source, "W_dec")
    return None


def _subtracted_bias(source: Source, config: dict[str, Any], architecture: str):
    """b_dec [D_in] if the encoder subtracts it: SAELens' default is yes, except in transcoders."""
    wanted = config.get("apply_b_dec_to_input", architecture not in TRANSCODERS)
    if not wanted:
        return None
    if architecture in TRANSCODERS:
        raise SaeError(
            f"{source.folder / 'cfg.json'}: apply_b_dec_to_input is true for a {architecture}, "
            "whose decoder bias belongs to another place in the network."
        )
    return source.tensors.read("b_dec")


def _normalization(config: dict[str, Any], source: Source) -> Normalization:
    value = config.get("normalize_activations", "none")
    known: dict[Any, Normalization] = {
        None: "none",
        False: "none",
        "none": "none",
        True: "none",  # before version 4: expected_average_only_in
        "expected_average_only_in": "none",
        "layer_norm": "layer_norm",
        "constant_norm_rescale": "constant_norm",
    }
    if value not in known:
        raise SaeError(
            f"{source.folder / 'cfg.json'}: normalize_activations is {value!r}; wanted one of "
            "none, layer_norm, constant_norm_rescale, expected_average_only_in."
        )
    return known[value]


def _site(config: dict[str, Any]) -> Site | None:
    names = [config.get("hf_hook_name"), config.get("hook_name"), config.get("hook_point")]
    if AFTER_ATTENTION in (names[0] or ""):
        names = names[:1]  # TransformerLens' name beside it is the stream before that norm
    found = (site_of(name, model_name=config.get("model_name")) for name in names)
    return next((site for site in found if site), None)


def _with_activation(
    sae: SaeWeights, base: str, config: dict[str, Any], source: Source
) -> SaeWeights:
    tensors, where = source.tensors, source.folder / "cfg.json"
    if base == "gated":
        return replace(
            sae,
            activation="gated",
            gate_scale=np.exp(tensors.read("r_mag")),
            gate_bias=tensors.read("b_gate"),
        )
    if base == "jumprelu":
        return replace(sae, activation="jumprelu", threshold=tensors.read("threshold"))
    if base in ("topk", "abstopk"):
        sae = replace(
            sae,
            activation="topk" if base == "topk" else "abstopk",
            k=source.k(config.get("k"), where),
        )
        return _fold_norms(sae) if config.get("rescale_acts_by_decoder_norm") else sae
    if base == "batchtopk":
        shared = np.full(sae.n_features, tensors.scalar("topk_threshold"), dtype=np.float32)
        sae = replace(sae, activation="jumprelu", threshold=shared)
        return _fold_norms(sae) if config.get("rescale_acts_by_decoder_norm", True) else sae
    return sae


def _fold_norms(sae: SaeWeights) -> SaeWeights:
    """Acts times the decoder's row lengths n, decoder rows divided by n."""
    assert sae.w_dec is not None
    norms = decoder_norms(sae.w_dec)  # [F]
    return replace(
        sae,
        w_enc=sae.w_enc * norms,
        b_enc=sae.b_enc * norms,
        w_dec=sae.w_dec * inverse(norms)[:, None],
    )


def _refuse_scaling_factor(source: Source) -> tuple[str, ...]:
    if "scaling_factor" not in source.tensors:
        return ()
    if (source.tensors.read("scaling_factor") != 1).any():
        raise SaeError(
            f"{source.file}: has a scaling_factor other than 1, which SAELens 6 does not read "
            "either. Load it with the SAELens version that trained it and fold the factor in."
        )
    return ()


def _fold_average(
    sae: SaeWeights, config: dict[str, Any], source: Source
) -> tuple[SaeWeights, tuple[str, ...]]:
    """expected_average_only_in: W_enc * f, W_dec / f, b_dec / f; the biases of the encoder stay."""
    if config.get("normalize_activations") not in (True, "expected_average_only_in"):
        if source.options.norm_scaling_factor is not None:
            raise SaeError(
                f"{source.folder / 'cfg.json'}: normalize_activations says that its inputs were "
                "not scaled by an average norm. Leave --norm-scaling-factor out."
            )
        return sae, ()
    factor = known_factor(source)
    if factor is None:
        return sae, (
            "Trained on inputs scaled by a factor that the files do not hold; raw inputs are used. "
            "Give the factor as --norm-scaling-factor.",
        )
    f = np.float32(factor)
    return replace(
        sae,
        w_enc=sae.w_enc * f,
        b_in=None if sae.b_in is None else sae.b_in / f,
        w_dec=None if sae.w_dec is None else sae.w_dec / f,
        b_dec=None if sae.b_dec is None else sae.b_dec / f,
    ), (f"Inputs are scaled by {factor:g} (folded into the weights).",)


def _fold_centring(sae: SaeWeights, config: dict[str, Any]) -> tuple[SaeWeights, tuple[str, ...]]:
    """Trained on a stream whose mean over D is 0: take the mean out within the weights.

    (x - mean(x) - b) W + c = x (W - colmean(W)) + (c - b W)
    """
    settings = {**(config.get("model_from_pretrained_kwargs") or {}), **config}
    writes = sae.site is not None and sae.site.kind in _WRITTEN
    if not settings.get("center_writing_weights") or sae.normalize != "none" or not writes:
        return sae, ()
    w_enc = np.asarray(sae.w_enc)  # a small model's
    shift = 0 if sae.b_in is None else sae.b_in @ w_enc  # [F]
    gate_scale = 1 if sae.gate_scale is None else sae.gate_scale
    return replace(
        sae,
        w_enc=w_enc - w_enc.mean(axis=0, dtype=np.float64).astype(np.float32),
        b_in=None,
        centred=True,
        b_enc=sae.b_enc - shift * gate_scale,
        gate_bias=None if sae.gate_bias is None else sae.gate_bias - shift,
    ), ("Trained on a residual stream of mean 0: the mean is taken out within the weights.",)
