"""Attention SAEs of Kissane et al.: NAME.pt + NAME_cfg.json, on hook_z with heads flattened."""

from __future__ import annotations

from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.common import Source, assert_width, finished, matrix
from fpo_mlx.sae.hooks import site_of

FORMAT = "connor_rob"


def matches(source: Source) -> bool:
    return "W_enc" in source.tensors and "act_name" in _config(source)


def load(source: Source) -> SaeWeights:
    config = _config(source)
    w_enc = matrix(source, "W_enc")
    assert_width(w_enc.shape[0], config.get("act_size"), "act_size", source.file)
    assert_width(w_enc.shape[1], config.get("dict_size"), "dict_size", source.file)
    bias = source.tensors.read("b_dec")
    return finished(
        SaeWeights(
            activation="relu",
            w_enc=w_enc,
            b_enc=source.tensors.read("b_enc"),
            b_in=bias,
            w_dec=matrix(source, "W_dec") if source.options.decoder else None,
            b_dec=bias,
            site=site_of(config.get("act_name")),
            model_name="gpt2" if "gpt2-small" in source.name else None,
            format=FORMAT,
            source=str(source.file),
        )
    )


def _config(source: Source) -> dict:
    return source.json(f"{source.file.stem}_cfg.json") or {}
