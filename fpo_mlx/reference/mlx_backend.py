"""The reference pass with MLX: the same rows, taps and pooling that training sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from fpo_mlx.config import Objective
from fpo_mlx.model import adapters
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.records import PairScore, SaeWeights, TokenPair
from fpo_mlx.train.scoring import Scorer, encoder_of


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
    ) -> None:
        """Raises: ModelError, SaeError for a model, adapter or site that does not fit."""
        loaded = load_model(model_path, trust_remote_code=trust_remote_code)
        if adapter_path is not None:
            adapters.load(loaded.model, Path(adapter_path))
            loaded.model.eval()
        sites = [sae.site for sae in saes if sae.site is not None]
        policy = Policy(loaded.model, loaded.config, sites, share_prompt=share_prompt)
        self._scorer = Scorer(policy, [encoder_of(sae) for sae in saes], Objective())
        self.notes = loaded.notes
        self.dtype = loaded.dtype

    def score(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        scores = []
        for pair in pairs:
            scores += self._scorer.reference([pair])
        mx.clear_cache()  # lengths differ from group to group: give back what is not reused
        return scores

    def activations(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = []
        for pair in pairs:
            tapped = self._scorer.policy.rows([pair]).tapped
            found.append([np.array(site.astype(mx.float32)) for site in tapped])
        mx.clear_cache()
        return [np.concatenate(site) for site in zip(*found, strict=True)]
