"""SAEs: what is public, what one is, what it says of activations; conversion."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx.config import RunConfig
from fpo_mlx.errors import FpoError
from fpo_mlx.pipeline.job import Say, at_site, one_sae, read_sae
from fpo_mlx.sae import registry
from fpo_mlx.sae.check import placed
from fpo_mlx.sae.convert import ConvertReport, SaeDtype, write_saelens
from fpo_mlx.sae.encode import encode
from fpo_mlx.storage import files
from fpo_mlx.storage.hub import read_config, resolve_model
from fpo_mlx.storage.outputs import Made, claim_folder

SAE = Made("an SAE", r"cfg\.json|sae_weights\.safetensors", whole=True, mark="cfg.json")


def sae_info(spec: str, config: RunConfig, say: Say) -> dict[str, Any]:
    """What an SAE is, as plain values; its site is where --layer and --site put it."""
    ref = config.reference
    sae = read_sae(spec, ref, say, on_disk=True)
    if ref.model:
        about = read_config(resolve_model(ref.model, weights=False))
        sae = at_site(sae, config, about, say)
    else:
        sae = placed(sae, ref.layer, ref.site)
    info = {
        "source": sae.source,
        "format": sae.format,
        "activation": sae.activation,
        "d_in": sae.d_in,
        "features": sae.n_features,
        "k": sae.k,
        "site": None if sae.site is None else asdict(sae.site),
        "model": sae.model_name,
        "normalize": sae.normalize,
        "neuronpedia": sae.neuronpedia,
        "fingerprint": sae.fingerprint(),
        "notes": list(sae.notes),
    }
    return info | ({"fits": ref.model} if ref.model else {})


def sae_list(model: str | None) -> list[dict[str, Any]]:
    """The public releases that are known here: all, or those for a model, exact ones first."""
    found = registry.fits(model) if model else registry.releases()
    return [
        {
            "release": release.release,
            "model": release.model,
            "site": release.site,
            "layers": release.layers,
            "widths": list(release.widths),
            "example": release.example,
            "trained_on_it": bool(model) and registry.trained_on(release, model or ""),
        }
        for release in found
    ]


def sae_convert(
    spec: str,
    config: RunConfig,
    *,
    output: Path,
    dtype: SaeDtype,
    overwrite: bool = False,
    say: Say,
) -> ConvertReport:
    """Write an SAE in SAELens' layout; --layer and --site correct what its metadata says."""
    inputs = [spec, *config.reads()]
    claim = partial(claim_folder, output, "--output", SAE, inputs=inputs, overwrite=overwrite)
    output = claim()
    ref = config.reference
    sae = placed(read_sae(spec, ref, say), ref.layer, ref.site)
    for note in sae.notes:
        say(note)
    return write_saelens(sae, output, dtype, claim)


def sae_encode(config: RunConfig, *, input: Path, say: Say) -> np.ndarray:
    """Activations of a .npy of vectors [N, D] (or [N, heads, head size]): float32 [N, F]."""
    one = one_sae(config, "sae encode")
    try:
        vectors = np.load(input, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FpoError(
            f"{input} cannot be read as an array: {error}. Wanted a .npy file of [N, D] floats."
        ) from error
    if not isinstance(vectors, np.ndarray):
        vectors.close()
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiu":
        found = getattr(vectors, "dtype", "an archive of several arrays")
        raise FpoError(f"{input}: found {found}, wanted a .npy file of [N, D] floats.")
    sae = read_sae(one, config.reference, say)
    if vectors.ndim > 2 and np.prod(vectors.shape[1:]) == sae.d_in:  # [N, heads, head size]
        vectors = vectors.reshape(len(vectors), -1)
    return encode(sae, vectors)


def write_activations(output: Path, acts: np.ndarray) -> None:
    """The file is written whole."""
    with files.atomic_path(output) as temporary, open(temporary, "wb") as file:
        np.save(file, acts)
