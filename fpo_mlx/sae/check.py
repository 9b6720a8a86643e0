"""Does an SAE fit this model, at this place? Widths and block numbers only; no model is needed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SITE_KINDS, SaeWeights, Site, SiteKind


def resolve_site(sae: SaeWeights, layer: int | None = None, kind: str | None = None) -> Site:
    """The SAE's own site, each half of it overridden by what the user gave.

    Raises SaeError if the metadata has no site and the user gave no layer, or for an unknown kind.
    """
    if kind is not None and kind not in SITE_KINDS:
        raise SaeError(f"site {kind!r} is unknown; wanted one of {', '.join(SITE_KINDS)}.")
    if sae.site is None and layer is None:
        raise SaeError(
            f"{sae.source}: does not say which block and site it was trained on, or by a name "
            "whose meaning in its model is not known here. Give --layer N (0-based) and --site."
        )
    own = sae.site or Site(cast(int, layer), "resid_post")
    return Site(own.layer if layer is None else layer, cast(SiteKind, kind) if kind else own.kind)


def placed(sae: SaeWeights, layer: int | None, kind: str | None) -> SaeWeights:
    """The SAE where the user put it; as its files say, or do not say, where they gave nothing."""
    given = layer is not None or kind is not None
    return replace(sae, site=resolve_site(sae, layer, kind)) if given else sae


def check_fit(
    sae: SaeWeights,
    *,
    site: Site,
    hidden_size: int,
    n_layers: int,
    z_sizes: Collection[int] = (),
    model_name: str | None = None,
) -> tuple[str, ...]:
    """Warnings, one sentence each; raises SaeError if the SAE cannot be attached at `site`.

    hidden_size: D of the residual stream. z_sizes: what the block's o_proj may read (`z_widths`);
    none if not known. model_name: warns when the SAE names a model that is clearly another.
    """
    if not 0 <= site.layer < n_layers:
        raise SaeError(
            f"{sae.source}: the SAE is for block {site.layer}, but the model has blocks 0 to "
            f"{n_layers - 1}. Use an SAE of this model, or give --layer."
        )
    wanted = sorted(z_sizes) if site.kind == "attn_z" else [hidden_size]
    if wanted and sae.d_in not in wanted:
        what = "heads x head size" if site.kind == "attn_z" else "hidden size"
        raise SaeError(
            f"{sae.source}: the SAE reads vectors of {sae.d_in}, but at {site} this model has "
            f"{' or '.join(map(str, wanted))} ({what}). It was trained on "
            f"{sae.model_name or 'another model'}; choose an SAE of this model "
            "(`fpo-mlx sae list --model …`)."
        )
    return tuple(_warnings(sae, site, model_name))


def z_widths(config: Mapping[str, Any], layer: int) -> set[int]:
    """What the output projection of a block's attention may read, by the model's config.json.

    Empty where that does not say; several where it does not say which block is of which kind.
    """
    heads, kinds = config.get("num_attention_heads"), config.get("layer_types") or ()
    kind = kinds[layer] if layer < len(kinds) else None
    full, linear = kind in (None, "full_attention"), kind in (None, "linear_attention")
    if not heads:
        return set()
    sizes = {config.get("head_dim") or config["hidden_size"] // heads}
    if config.get("v_head_dim"):  # latent attention: values have a size of their own
        sizes = {config["v_head_dim"]}
    elif full and config.get("global_head_dim"):  # Gemma 4
        sizes = {config["global_head_dim"]} | (sizes if kind is None else set())
    widths = {heads * size for size in sizes}
    if linear and config.get("linear_num_value_heads"):  # Qwen3-Next
        own = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        widths = {own} | (widths if kind is None else set())
    return widths


def _warnings(sae: SaeWeights, site: Site, model_name: str | None):
    if sae.site is not None and sae.site != site:
        yield f"The SAE was trained on {sae.site}; it is used on {site}."
    if sae.model_name and model_name and _plain(sae.model_name) != _plain(model_name):
        yield (
            f"The SAE was trained on {sae.model_name}, the model is {model_name}. Prefer an SAE "
            "of this model if there is one (`fpo-mlx sae list --model …`)."
        )


def _plain(model: str) -> str:
    """A model's name without owner and storage format, for comparison only."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    name = re.sub(r"[-_](?:\d+-?bits?|bf16|fp16|fp32|mxfp\d|q\d|dwq|qat|mlx)\b.*", "", name)
    return re.sub(r"^meta-|-(?:pt|hf)(?=-|$)", "", name)
