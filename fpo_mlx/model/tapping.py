"""A loaded model with taps where SAEs read, once it is known that they can read there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.nn as nn

from fpo_mlx.model.load import LoadedModel
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import Reader, encoder_of
from fpo_mlx.model.taps import tap_point
from fpo_mlx.model.trees import blocks_of, input_width
from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.sae.check import refuse_width


def refuse_other_widths(saes: Iterable[SaeWeights], model: nn.Module) -> None:
    """Of attn_z, for which config.json does not always say what the block's projection reads.

    Raises: SaeError; ModelError where the block has no such place.
    """
    blocks = blocks_of(model)
    for sae in saes:
        site = sae.site
        if site is None or site.kind != "attn_z":
            continue
        if site.layer < len(blocks):  # else `Policy` says so
            layer, _ = tap_point(blocks[site.layer], site)
            refuse_width(sae, site, [input_width(layer)])


def tapped(
    loaded: LoadedModel, saes: Sequence[SaeWeights], *, also: Sequence[Site] = (), **how: Any
) -> Policy:
    """Taps where the SAEs read, in their order, and behind them `also`. how: settings of `Policy`.

    Raises: as `refuse_other_widths`, and as `Policy` for sites that the model does not have.
    """
    refuse_other_widths(saes, loaded.model)
    sites = [sae.site for sae in saes if sae.site is not None]
    return Policy(loaded.model, loaded.config, [*sites, *also], **how)


def reader_of(loaded: LoadedModel, saes: Sequence[SaeWeights], **how: Any) -> Reader:
    """What reads responses by these SAEs; how: as `tapped`."""
    return Reader(tapped(loaded, saes, **how), [encoder_of(sae) for sae in saes])
