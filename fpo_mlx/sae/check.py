"""Does an SAE fit this model, at this place? Widths and block numbers only; no model is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SITE_KINDS, SaeWeights, Site, SiteKind
from fpo_mlx.sae.names import plain

DEEP = 2 / 3  # of the blocks; between 18 of 30 and 27, of which one held: studies/blocks.py


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
    if wanted:
        refuse_width(sae, site, wanted)
    return tuple(_warnings(sae, site, model_name))


def refuse_width(sae: SaeWeights, site: Site, wanted: Collection[int]) -> None:
    """Raise SaeError where the SAE reads vectors of none of these sizes, which the site has."""
    if sae.d_in in wanted:
        return
    what = "heads x head size" if site.kind == "attn_z" else "hidden size"
    raise SaeError(
        f"{sae.source}: the SAE reads vectors of {sae.d_in}, but at {site} this model has "
        f"{' or '.join(map(str, wanted))} ({what}). It was trained on "
        f"{sae.model_name or 'another model'}; choose an SAE of this model "
        "(`fpo-mlx sae list --model …`)."
    )


# of config.json: where blocks differ in what their projection reads, in ways that are not read here
# (Nemotron-H, PLaMo 2, Kimi Linear, Bailing's hybrids)
_OWN_BLOCKS = (
    "hybrid_override_pattern",
    "layers_block_type",
    "mamba_num_heads",
    "hidden_size_per_head",
    "linear_attn_config",
    "layer_group_size",
)


GEMMA_HEAD = 256  # the default of Gemma 3's class


def z_widths(config: Mapping[str, Any], layer: int) -> set[int]:
    """What the output projection of a block's attention may read, by the model's config.json.

    Empty where that does not say; several where it does not say which block is of which kind.
    """
    heads, kinds = config.get("num_attention_heads"), config.get("layer_types") or ()
    kind = kinds[layer] if layer < len(kinds) else None
    full, linear = kind in (None, "full_attention"), kind in (None, "linear_attention")
    if not (isinstance(heads, int) and heads) or any(config.get(key) for key in _OWN_BLOCKS):
        return set()
    size = config.get("head_dim") or config["hidden_size"] // heads
    if not config.get("head_dim") and str(config.get("model_type")).startswith("gemma3"):
        size = GEMMA_HEAD  # which is what its class takes, as for the 12B
    if own := _own_heads(config, layer, kind):
        return {own[0] * (own[1] or size)}
    sizes = {size}
    if config.get("v_head_dim"):  # latent attention: values have a size of their own
        sizes = {config["v_head_dim"]}
    elif full and config.get("global_head_dim"):  # Gemma 4
        sizes = {config["global_head_dim"]} | (sizes if kind is None else set())
    widths = {heads * size for size in sizes}
    if linear and config.get("linear_num_value_heads"):  # Qwen3-Next
        values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        widths = {values} | (widths if kind is None else set())
    return widths


def _own_heads(
    config: Mapping[str, Any], layer: int, kind: str | None
) -> tuple[int, int | None] | None:
    """How many heads a block has, and their size where that is its own, too; None: as all have."""
    sliding = kind == "sliding_attention" or (kind is None and layer % 2 == 0)
    if sliding and (other := config.get("attention_other_setting")):  # Step 3.5
        return other["num_attention_heads"], None
    if any((config.get("hybrid_layer_pattern") or ())[layer : layer + 1]):  # MiMo V2
        return config["swa_num_attention_heads"], config["swa_v_head_dim"]
    if counts := (config.get("num_attention_heads_per_layer") or ())[layer : layer + 1]:  # Laguna
        return counts[0], None
    return None


def _warnings(sae: SaeWeights, site: Site, model_name: str | None):
    if sae.site is not None and sae.site != site:
        yield f"The SAE was trained on {sae.site}; it is used on {site}."
    if sae.model_name and model_name and plain(sae.model_name) != plain(model_name):
        yield (
            f"The SAE was trained on {sae.model_name}, the model is {model_name}. Prefer an SAE "
            "of this model if there is one (`fpo-mlx sae list --model …`)."
        )
