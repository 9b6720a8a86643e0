"""Two torch linear layers and a ReLU: Goodfire and qresearch. The layer is in the file's name."""

from __future__ import annotations

import re

from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.sae.common import Source, finished, matrix, transposed
from fpo_mlx.sae.hooks import layer_in

GOODFIRE = "goodfire"
QRESEARCH = "qresearch"


def matches_goodfire(source: Source) -> bool:
    return "encoder_linear.weight" in source.tensors


def matches_qresearch(source: Source) -> bool:
    return {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} == set(
        source.tensors.shapes
    )


def load_goodfire(source: Source) -> SaeWeights:
    return _load(source, GOODFIRE, "encoder_linear", "decoder_linear")


def load_qresearch(source: Source) -> SaeWeights:
    return _load(source, QRESEARCH, "encoder", "decoder")


def _load(source: Source, format: str, encoder: str, decoder: str) -> SaeWeights:
    """relu(x W + b), nothing subtracted; trained on the residual stream after block L."""
    layer = layer_in(source.file.name)
    model = re.search(r"((?:DeepSeek|Llama|Meta-Llama)[\w.-]*?)-SAE-l\d+", source.name)
    return finished(
        SaeWeights(
            activation="relu",
            w_enc=transposed(matrix(source, f"{encoder}.weight")),
            b_enc=source.tensors.read(f"{encoder}.bias"),
            w_dec=transposed(matrix(source, f"{decoder}.weight"))
            if source.options.decoder
            else None,
            b_dec=source.tensors.read(f"{decoder}.bias"),
            site=None if layer is None else Site(layer, "resid_post"),
            model_name=model[1] if model else None,
            format=format,
            source=str(source.file),
        )
    )
