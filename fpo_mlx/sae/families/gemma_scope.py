"""Gemma Scope (Gemma 2): layer_L/width_W/average_l0_N/params.npz; everything else is in the path.

JumpReLU with a threshold per feature, raw activations in, no subtraction of b_dec.
"""

from __future__ import annotations

import re

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site, SiteKind
from fpo_mlx.sae.common import Source, finished, matrix
from fpo_mlx.sae.hooks import layer_in

FORMAT = "gemma_scope"
_KINDS: dict[str, SiteKind] = {
    "res": "resid_post",
    "mlp": "mlp_out",
    "att": "attn_z",
    "transcoders": "mlp_in_unscaled",
    "transcoder": "mlp_in_unscaled",
}


def matches(source: Source) -> bool:
    return source.file.suffix == ".npz" and "threshold" in source.tensors


def load(source: Source) -> SaeWeights:
    if re.search(r"(^|/)embedding/width_", source.file.as_posix()):
        raise SaeError(
            f"{source.file}: this Gemma Scope SAE reads the token embeddings, which no adapter "
            "changes, so it cannot constrain training. Choose a layer_* folder."
        )
    kind = kind_in(source.name)
    layer = layer_in(source.file.as_posix())
    site = None if layer is None else Site(layer, kind or "resid_post")
    unnamed = f"The path does not name the site; taken as {site}." if site else ""
    return finished(
        SaeWeights(
            activation="jumprelu",
            w_enc=matrix(source, "W_enc", "w_enc"),
            b_enc=source.tensors.read("b_enc"),
            threshold=source.tensors.read("threshold"),
            w_dec=matrix(source, "W_dec", "w_dec") if source.options.decoder else None,
            b_dec=source.tensors.get("b_dec"),
            transcoder=kind == "mlp_in_unscaled",
            site=site,
            model_name=model_in(source.name),
            format=FORMAT,
            source=str(source.folder),
            notes=() if kind or not unnamed else (unnamed,),
        )
    )


def kind_in(name: str) -> SiteKind | None:
    """The site in a repository name such as "google/gemma-scope-2b-pt-res" ("_res" counts too)."""
    found = re.findall(r"gemma[-_]scope[\w.]*(?:-\w+)*?[-_](res|mlp|att|transcoders?)\b", name)
    return _KINDS[found[-1]] if found else None


def model_in(name: str) -> str | None:
    """ "…gemma-scope-9b-it-res…" -> "google/gemma-2-9b-it"; pt is the plain base model."""
    match = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-", name)
    if not match:
        return None
    return f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else "")
