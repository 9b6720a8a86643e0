"""Qwen-Scope: layerN.sae.pt at the root of Qwen/SAE-Res-MODEL-W32K-L0_50; k is in that name only.

Top-k of the pre-activations, then ReLU (as SAELens reads it; the model card leaves the ReLU out,
which differs only for a token with fewer than k positive features).
"""

from __future__ import annotations

import re

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.sae.common import Source, finished, matrix, transposed
from fpo_mlx.sae.hooks import layer_in

FORMAT = "qwen_scope"


def matches(source: Source) -> bool:
    named = re.fullmatch(r"layer\d+\.sae\.(pt|safetensors)", source.file.name)
    return bool(named) and "W_enc" in source.tensors


def load(source: Source) -> SaeWeights:
    layer = layer_in(source.file.name)
    model = re.search(r"SAE-Res-(.+?)-W\d+K", source.name)
    return finished(
        SaeWeights(
            activation="topk",
            w_enc=transposed(matrix(source, "W_enc")),
            b_enc=source.tensors.read("b_enc"),
            k=_k(source),
            w_dec=transposed(matrix(source, "W_dec")) if source.options.decoder else None,
            b_dec=source.tensors.get("b_dec"),
            site=None if layer is None else Site(layer, "resid_post"),
            model_name=f"Qwen/{model[1]}" if model else None,
            format=FORMAT,
            source=str(source.file),
        )
    )


def _k(source: Source) -> int:
    found = re.findall(r"[-_]L0_(\d+)", source.name)
    if not found and source.options.k is None:
        raise SaeError(
            f"{source.file}: k is not in the file but in the repository's name (…-L0_50). Keep "
            "the file in a folder of that name, or give it as --sae-k."
        )
    return source.k(int(found[-1]) if found else None, source.file)
