"""Gemma Scope 2 (Gemma 3): SITE[_all]/layer_L_width_W_l0_N/{params.safetensors,config.json}.

JumpReLU, raw activations in, no subtraction of b_dec. config.json may be absent: the path says
the rest. Cross-layer transcoders (clt/…/params_layer_L.safetensors) are read for encoding only.
"""

from __future__ import annotations

import re
from typing import Any

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site, SiteKind
from fpo_mlx.sae.common import Source, finished, matrix
from fpo_mlx.sae.hooks import layer_in, site_of

FORMAT = "gemma_scope_2"
_KINDS: dict[str, SiteKind] = {
    "resid_post": "resid_post",
    "attn_out": "attn_z",
    "mlp_out": "mlp_out",
    "transcoder": "mlp_in",
    "clt": "mlp_in",
}


def matches(source: Source) -> bool:
    return "w_enc" in source.tensors and source.file.suffix == ".safetensors"


def load(source: Source) -> SaeWeights:
    config = source.json("config.json") or {}
    if "crosscoder" in source.file.as_posix() or source.tensors.rank("w_enc") != 2:
        raise SaeError(
            f"{source.file}: is a crosscoder, which reads several layers at once; "
            "a constraint needs an SAE of one place. Choose a resid_post folder."
        )
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise SaeError(f"{source.file}: architecture {config['architecture']!r}; wanted jump_relu.")
    kind = _kind(source, config)
    notes = []
    whole = source.tensors.rank("w_dec") == 2
    if not whole:
        notes.append("A cross-layer transcoder writes to several layers: read for encoding only.")
    if "affine_skip_connection" in source.tensors:
        notes.append("The affine skip connection is not used: it does not enter the features.")
    decoder = whole and source.options.decoder
    return finished(
        SaeWeights(
            activation="jumprelu",
            w_enc=matrix(source, "w_enc"),
            b_enc=source.tensors.read("b_enc"),
            threshold=source.tensors.read("threshold"),
            w_dec=matrix(source, "w_dec") if decoder else None,
            b_dec=source.tensors.read("b_dec") if decoder else None,
            transcoder=kind in ("transcoder", "clt"),
            site=_site(source, config, kind),
            model_name=_model(source, config),
            format=FORMAT,
            source=str(source.folder),
            notes=tuple(notes),
        )
    )


def _kind(source: Source, config: dict[str, Any]) -> str | None:
    found = re.findall(r"/(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?/", str(source.file))
    return found[-1] if found else config.get("type")


def _site(source: Source, config: dict[str, Any], kind: str | None) -> Site | None:
    named = site_of(config.get("hf_hook_point_in"), model_name="gemma-3")
    layer = layer_in(source.file.as_posix())
    if named or layer is None or kind not in _KINDS:
        return named
    return Site(layer, _KINDS[kind])


def _model(source: Source, config: dict[str, Any]) -> str | None:
    """ "gemma-v3-1b-pt" or "…gemma-scope-2-1b-pt…" -> "google/gemma-3-1b-pt"."""
    text = f"{config.get('model_name', '')}|{source.name}"
    match = re.search(r"gemma-(?:v3|3|scope-2)-(270m|1b|4b|12b|27b)-(pt|it)", text)
    return f"google/gemma-3-{match[1]}-{match[2]}" if match else config.get("model_name")
