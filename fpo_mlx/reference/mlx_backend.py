"""The reference pass with MLX: the same rows, taps and pooling that training sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from fpo_mlx.machine import device
from fpo_mlx.model.open import open_model
from fpo_mlx.model.tapping import reader_of
from fpo_mlx.records import PairScore, Projection, SaeWeights, TokenPair


class MlxBackend:
    """`ReferenceBackend` on this machine's MLX device. One pair at a time, prompt once."""

    name = "mlx"

    def __init__(
        self,
        model_path: str | Path,
        adapter_path: str | Path | None = None,
        saes: Sequence[SaeWeights] = (),
        *,
        share_prompt: bool = True,
        trust_remote_code: bool = False,
        projections: Sequence[Projection] = (),
    ) -> None:
        """Raises: ModelError, SaeError for a model, adapter or site that does not fit."""
        loaded = open_model(model_path, adapter=adapter_path, trust_remote_code=trust_remote_code)
        self._reader = reader_of(loaded, saes, share_prompt=share_prompt, projections=projections)
        self.notes = loaded.notes
        self.dtype = loaded.dtype

    def score(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        scores = []
        for pair in pairs:
            scores += self._reader.scores([pair])
            device.tidy()
        mx.clear_cache()  # lengths differ from group to group: give back what is not reused
        return scores

    def activations(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        found = [self._reader.activations([pair]) for pair in pairs]
        mx.clear_cache()
        return [np.concatenate(site) for site in zip(*found, strict=True)]
