"""EleutherAI sparsify: HOOKPOINT/{cfg.json,sae.safetensors}; the folder's name is the module.

Formulas: eai-sparsify 1.3.3, sparse_coder.py. ReLU before top-k changes nothing but the count of
non-zeros, which topk's own ReLU gives too.
"""

from __future__ import annotations

import re
from typing import Any

from fpo_mlx.errors import SaeError
from fpo_mlx.records import Activation, SaeWeights, Site
from fpo_mlx.sae.common import (
    Source,
    assert_width,
    finished,
    matrix,
    read_json,
    transposed,
)
from fpo_mlx.sae.hooks import site_of

FORMAT = "sparsify"


def matches(source: Source) -> bool:
    return "encoder.weight" in source.tensors and "W_dec" in source.tensors


def load(source: Source) -> SaeWeights:
    config = source.json("cfg.json")
    if config is None:
        raise SaeError(f"{source.folder}: has no cfg.json, which holds k. Download it too.")
    where = source.folder / "cfg.json"
    transcode = bool(config.get("transcode"))
    w_enc = transposed(matrix(source, "encoder.weight"))
    assert_width(w_enc.shape[0], config.get("d_in"), "d_in", where)
    assert_width(w_enc.shape[1], config.get("num_latents") or None, "num_latents", where)
    b_dec = source.tensors.read("b_dec")
    notes = []
    if "W_skip" in source.tensors:
        notes.append("The skip connection is not used: it does not enter the features.")
    return finished(
        SaeWeights(
            activation=_activation(config, source),
            w_enc=w_enc,
            b_enc=source.tensors.read("encoder.bias"),
            b_in=None if transcode else b_dec,
            k=source.k(config.get("k"), where),
            w_dec=matrix(source, "W_dec") if source.options.decoder else None,
            b_dec=b_dec,
            transcoder=transcode,
            site=_site(source, transcode),
            model_name=_model(source),
            format=FORMAT,
            source=str(source.folder),
            notes=tuple(notes),
        )
    )


def _activation(config: dict[str, Any], source: Source) -> Activation:
    if config.get("signed"):
        return "abstopk"  # the 2024 option: k largest in magnitude, no ReLU
    name = config.get("activation", "topk")
    if name not in ("topk", "groupmax"):
        raise SaeError(f"{source.folder}: activation {name!r}; wanted topk or groupmax.")
    return name


def _site(source: Source, transcode: bool) -> Site | None:
    """The module's output, or its input for a transcoder."""
    pattern = r"(?:[\w.]*\.)?(?:layers|h)\.\d+(?:\.[\w.]+)?|embed_tokens|embed_in|wte"
    names = [part for part in source.folder.parts if re.fullmatch(pattern, part)]
    site = site_of(names[-1], model_name=_model(source)) if names else None
    if site is None or not transcode:
        return site
    return Site(site.layer, "mlp_in") if site.kind == "mlp_raw" else None


def _model(source: Source) -> str | None:
    """`model` of the training configuration at the repository's root, if it was downloaded."""
    for folder in source.folder.parents[:2]:
        if (folder / "config.json").is_file():
            name = read_json(folder / "config.json").get("model")
            return name if isinstance(name, str) else None
    return None
