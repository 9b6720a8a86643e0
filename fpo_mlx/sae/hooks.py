"""Hook names, as SAE authors write them, to places in the network."""

from __future__ import annotations

import re

from fpo_mlx.records import (
    AFTER_ATTENTION,
    BEFORE_MLP,
    BEHIND_ATTENTION,
    BEHIND_MLP,
    Site,
    SiteKind,
)

# TransformerLens: the rest of the name after "blocks.L."
_TRANSFORMER_LENS: dict[str, SiteKind] = {
    "hook_resid_post": "resid_post",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
    "ln2.hook_normalized": "mlp_in_unscaled",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_raw",
    "attn.hook_out": "attn_raw",
    # in TransformerLens this is the stream before the norm, whatever the name suggests
    "hook_mlp_in": "resid_mid",
}
# Module paths: the rest after "layers.L"
_MODULES: dict[str, SiteKind] = {
    "": "resid_post",
    "output": "resid_post",
    "input": "resid_pre",
    "mlp": "mlp_raw",
    "mlp.output": "mlp_raw",
    "mlp.input": "mlp_in",
    "self_attn": "attn_raw",
    "self_attn.output": "attn_raw",
    "attention": "attn_raw",
    "attn": "attn_raw",
    "linear_attn": "attn_raw",
    "self_attn.o_proj.input": "attn_z",
}
# Norms among them, by their output
_NORMS: dict[str, SiteKind] = {
    **dict.fromkeys(BEHIND_ATTENTION, "attn_out"),
    **dict.fromkeys(BEFORE_MLP, "mlp_in"),
    **dict.fromkeys(BEHIND_MLP, "mlp_out"),
}
# What AFTER_ATTENTION gives, by the name of the model: the first that is found in it decides
_AFTER_ATTENTION: tuple[tuple[str, SiteKind], ...] = (
    (r"gemma-?v?[2-9](?![\d.]*b)", "attn_out"),  # gemma-2-2b, but not gemma-2b
    (r"olmo-?[23](?![\d.]*b)|flex-?olmo", "attn_out"),
    (r"exaone-?4|afmoe|trinity-(?:nano|mini|large)|muse-?glimmer", "attn_out"),
    (r"(?<![a-z])(?:code)?gemma-?(?:1(?:\.\d)?-)?[27]b", "mlp_in"),  # the first Gemma
    (r"olmo-?[17]b|olmoe", "mlp_in"),
    (r"llama|qwen|mi[sx]tral|ministral|pythia|gpt-neox|gpt-oss|smollm|deepseek|glm-?4", "mlp_in"),
    (r"granite|phi-?[34]|vicuna|\byi-", "mlp_in"),
)
# dictionary_learning: "<name>_layer_L"; its hooks are on modules
_SUBMODULES: dict[str, SiteKind] = {
    "resid_post": "resid_post",
    "resid_pre": "resid_pre",
    "resid": "resid_post",
    "mlp_out": "mlp_raw",
    "mlp": "mlp_raw",
    "attn_out": "attn_raw",
    "attention_out": "attn_raw",
    "attn": "attn_raw",
}
_EMBEDDINGS = {"hook_embed", "embed_tokens", "model.embed_tokens", "wte", "embed_in"}


def site_of(name: str | None, *, model_name: str | None = None) -> Site | None:
    """The place that a hook name means, or None when it is not known.

    `name`: "blocks.3.hook_resid_post", "model.layers.3.output", "layers.3.mlp", "h.3.attn",
    "resid_post_layer_3", "hook_embed". `model_name` decides what "post_attention_layernorm" is:
    behind attention (Gemma 2, OLMo 2) or before the MLP (Llama); of other models it is not known.
    """
    if not name:
        return None
    name = name.strip().strip(".")
    if name in _EMBEDDINGS:
        return Site(0, "resid_pre")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        kind = _TRANSFORMER_LENS.get(match[2])
    elif match := re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h)\.(\d+)\.?(.*)", name):
        kind = _module_kind(match[2], model_name)
    elif match := re.fullmatch(r"(\w+)_layer_?(\d+)", name):
        match, kind = re.match(r".*?(\d+)$", name), _SUBMODULES.get(match[1])
    else:
        return None
    return Site(int(match[1]), kind) if match and kind else None


def _module_kind(rest: str, model_name: str | None) -> SiteKind | None:
    norm = rest.removesuffix(".output")
    if norm != AFTER_ATTENTION:
        return _MODULES.get(rest) or _NORMS.get(norm)
    name = (model_name or "").lower().replace("_", "-")
    return next((kind for part, kind in _AFTER_ATTENTION if re.search(part, name)), None)


def layer_in(text: str) -> int | None:
    """The block number in a path such as "layer_25/width_16k", "layers.10.mlp", "…-l19.pth"."""
    for pattern in (r"layers?[_.]?(\d+)", r"(?<=[-/])[lL](\d+)(?!\d)"):
        if found := re.findall(pattern, text):
            return int(found[-1])
    return None
