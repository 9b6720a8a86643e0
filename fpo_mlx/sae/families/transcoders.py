"""Transcoders without a library's layout: mwhanna's, per layer, and mntss', cross-layer.

Both: relu(x W + b), W_enc stored [F, D]. A cross-layer transcoder writes to many layers, so only
its encoder is read. config.yaml beside the weights names the model and the input hook.
"""

from __future__ import annotations

import re

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.sae.common import Source, assert_width, finished, matrix, transposed
from fpo_mlx.sae.hooks import site_of

MWHANNA = "mwhanna_transcoder"
MNTSS = "mntss_clt"


def matches_mwhanna(source: Source) -> bool:
    return bool(re.fullmatch(r"layer_\d+\.safetensors", source.file.name)) and all(
        name in source.tensors for name in ("W_enc", "W_dec", "b_enc")
    )


def matches_mntss(source: Source) -> bool:
    return any(re.fullmatch(r"W_enc_\d+", name) for name in source.tensors.shapes)


def load_mwhanna(source: Source) -> SaeWeights:
    layer = _layer(source, re.findall(r"layer_(\d+)", source.file.stem))
    w_enc = transposed(matrix(source, "W_enc"))
    for name in ("wandb-config.yaml", "wanb-config.yaml"):  # the authors' spelling varies
        training = _yaml_values(source, name)
        assert_width(w_enc.shape[0], training.get("d_model"), "d_model", source.file)
        assert_width(w_enc.shape[1], training.get("d_feature"), "d_feature", source.file)
    notes = ()
    if "W_skip" in source.tensors:
        notes = ("The skip connection is not used: it does not enter the features.",)
    return finished(
        SaeWeights(
            activation="relu",
            w_enc=w_enc,
            b_enc=source.tensors.read("b_enc"),
            w_dec=matrix(source, "W_dec") if source.options.decoder else None,
            b_dec=source.tensors.get("b_dec"),
            transcoder=True,
            site=_site(source, layer),
            model_name=_yaml_values(source, "config.yaml").get("model_name"),
            format=MWHANNA,
            source=str(source.file),
            notes=notes,
        )
    )


def load_mntss(source: Source) -> SaeWeights:
    layer = _layer(source, re.findall(r"W_enc_(\d+)", " ".join(source.tensors.shapes)))
    return finished(
        SaeWeights(
            activation="relu",
            w_enc=transposed(matrix(source, f"W_enc_{layer}")),
            b_enc=source.tensors.read(f"b_enc_{layer}"),
            transcoder=True,
            site=_site(source, layer),
            model_name=_yaml_values(source, "config.yaml").get("model_name"),
            format=MNTSS,
            source=str(source.file),
            notes=("A cross-layer transcoder writes to many layers: read for encoding only.",),
        )
    )


def _layer(source: Source, found: list[str]) -> int:
    """The one block number among the names of file or tensors."""
    if len(found) != 1:
        raise SaeError(
            f"{source.file}: wanted one block number in its name or tensors, found {len(found)}. "
            "Give one layer_L.safetensors or W_enc_L.safetensors file."
        )
    return int(found[0])


def _site(source: Source, layer: int) -> Site | None:
    hook = _yaml_values(source, "config.yaml").get("feature_input_hook", "mlp.hook_in")
    return site_of(f"blocks.{layer}.{hook}")


def _yaml_values(source: Source, name: str) -> dict[str, str]:
    """The plain `key: value` lines of a YAML file, and wandb's `key:` / `  value: x` pairs."""
    path = source.folder / name
    if not path.is_file():
        return {}
    values: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"(\s*)([\w.-]+):\s*(.*?)\s*", line):
            indent, name, value = match.groups()
            if not indent:
                key = name
            if value and (not indent or name == "value"):
                values[key] = value.strip("'\"")
    return values
