"""OpenAI's GPT-2 autoencoders: LOCATION/LAYER.pt with pre_bias and latent_bias.

Formulas: openai/sparse_autoencoder 4965b94, model.py. TopK ones normalise each token first.
"""

from __future__ import annotations

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site, SiteKind
from fpo_mlx.sae.common import Source, finished, matrix, transposed

FORMAT = "openai"
_LOCATIONS: dict[str, SiteKind] = {
    "resid_post_mlp": "resid_post",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_delta_attn": "attn_out",
}


def matches(source: Source) -> bool:
    return "latent_bias" in source.tensors and "pre_bias" in source.tensors


def load(source: Source) -> SaeWeights:
    extras = source.tensors.extras
    name = extras.get("activation", "ReLU")
    state = extras.get("activation_state_dict") or {}
    if name not in ("ReLU", "TopK") or state.get("postact_fn", "ReLU") != "ReLU":
        raise SaeError(
            f"{source.file}: activation {name!r} with {state.get('postact_fn')!r} after it; "
            "wanted ReLU, or TopK with ReLU."
        )
    topk = name == "TopK"
    bias = source.tensors.read("pre_bias")
    return finished(
        SaeWeights(
            activation="topk" if topk else "relu",
            w_enc=transposed(matrix(source, "encoder.weight")),
            b_enc=source.tensors.read("latent_bias"),
            b_in=bias,
            k=source.k(state.get("k"), source.file) if topk else None,
            normalize="layer_norm" if topk else "none",
            w_dec=transposed(matrix(source, "decoder.weight")) if source.options.decoder else None,
            b_dec=bias,
            site=_site(source),
            model_name="gpt2",
            format=FORMAT,
            source=str(source.file),
        )
    )


def _site(source: Source) -> Site | None:
    if not source.file.stem.isdigit():
        return None
    layer = int(source.file.stem)
    found = (Site(layer, kind) for name, kind in _LOCATIONS.items() if name in source.name)
    return next(found, None)
