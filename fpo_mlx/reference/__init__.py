"""Scoring with the frozen reference model: one Protocol, two backends.

Importing this loads neither mlx nor torch; `open_backend` loads the one that is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fpo_mlx.errors import ConfigError, pip_install
from fpo_mlx.machine import upstream
from fpo_mlx.records import PairScore, Projection, SaeWeights, TokenPair


class ReferenceBackend(Protocol):
    """Scores pairs with the frozen reference model: numpy in, numpy out.

    A score depends on its own prompt and response alone: not on padding, batch or the other side.
    """

    name: str  # "mlx" or "torch"; written to the cache
    dtype: str  # of the weights in the pass: "float32", "bfloat16", "float16"
    notes: tuple[str, ...]  # what a user should know of how the model was loaded

    def score(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        """(chosen, rejected) of each pair, in order; one feature vector for each SAE."""
        ...

    def activations(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        """For each SAE what its site holds at the response positions, float32 [R, D_in]."""
        ...


def open_backend(
    name: str,
    *,
    model_path: str | Path,
    adapter_path: str | Path | None = None,
    saes: Sequence[SaeWeights] = (),
    device: str | None = None,
    dtype: str | None = None,
    tokens_per_batch: int | None = None,
    share_prompt: bool = True,
    trust_remote_code: bool = False,
    projections: Sequence[Projection] = (),
) -> ReferenceBackend:
    """Load the reference model, a folder, with its adapter.

    device, dtype and tokens_per_batch are the torch backend's. All but the paths, the SAEs and the
    projections change time and memory only (dtype also the rounding). Every SAE needs its `site`.
    projections: what the model goes on without, in every pass.
    Raises: ConfigError for a backend that is unknown or not installed, ModelError and SaeError for
    a model, adapter or SAE that cannot be used.
    """
    if name not in ("mlx", "torch"):
        raise ConfigError(f"--backend {name}: wanted mlx or torch.")
    if importlib.util.find_spec(name) is None:
        how = pip_install("torch") if name == "torch" else upstream.how_to_get_mlx()
        other = "mlx" if name == "torch" else "torch"
        raise ConfigError(
            f"--backend {name}: the package {name} is not installed here. Install it ({how}), or "
            f"use --backend {other}."
        )
    if name == "mlx" and device is not None:
        raise ConfigError(f"--device {device} is for --backend torch, and this is mlx.")
    if name == "mlx":
        from fpo_mlx.reference.mlx_backend import MlxBackend

        return MlxBackend(
            model_path=model_path,
            adapter_path=adapter_path,
            saes=saes,
            share_prompt=share_prompt,
            trust_remote_code=trust_remote_code,
            projections=projections,
        )
    from fpo_mlx.reference.torch_backend import TorchBackend

    return TorchBackend(
        model_path=model_path,
        adapter_path=adapter_path,
        saes=saes,
        device=device,
        dtype=dtype,
        tokens_per_batch=tokens_per_batch,
        share_prompt=share_prompt,
        trust_remote_code=trust_remote_code,
        projections=projections,
    )
