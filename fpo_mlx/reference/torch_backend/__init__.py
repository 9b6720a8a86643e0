"""The reference pass with PyTorch: transformers' model, on CUDA, Metal or the CPU. No mlx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fpo_mlx.errors import ModelError
from fpo_mlx.records import (
    PairScore,
    Projection,
    ResponseScore,
    SaeWeights,
    SparseFeatures,
    TokenPair,
)
from fpo_mlx.reference.torch_backend import passes
from fpo_mlx.reference.torch_backend.head import Head
from fpo_mlx.reference.torch_backend.load import choose_device, choose_dtype, load_model
from fpo_mlx.reference.torch_backend.saes import on_device, pooled, refuse_width
from fpo_mlx.reference.torch_backend.taps import Recorder, find_tap, project, width_of

TOKENS_PER_BATCH = {"cpu": 2048, "mps": 4096, "cuda": 16384}  # padding counts
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate")


class TorchBackend:
    """`ReferenceBackend` with transformers: batches of a token budget, sorted by length."""

    name = "torch"

    def __init__(
        self,
        model_path: str | Path,
        adapter_path: str | Path | None = None,
        saes: Sequence[SaeWeights] = (),
        *,
        device: str | None = None,
        dtype: str | None = None,
        tokens_per_batch: int | None = None,
        share_prompt: bool = True,
        trust_remote_code: bool = False,
        projections: Sequence[Projection] = (),
    ) -> None:
        """device: None for CUDA, else Metal, else the CPU. dtype: None for float32 on a CPU, else
        the folder's. tokens_per_batch: what a batch may hold, padding included; halved by itself
        when memory runs out. share_prompt: run a pair's prompt once where that saves a tenth or
        more and the model's caches are plain. projections: what the model goes on without.

        Raises: ConfigError, ModelError, SaeError for settings, files or sites that do not fit.
        """
        folder, self.device = Path(model_path), choose_device(device)
        weights = choose_dtype(dtype, folder, self.device)
        adapter = Path(adapter_path) if adapter_path is not None else None
        self._model, self.notes = load_model(
            folder, adapter, self.device, weights, trust_remote_code=trust_remote_code
        )
        for one in projections:  # before the recorder, which sees what is left
            project(find_tap(self._model, one.site), self._put(one.basis))
        self._saes = [on_device(sae, self.device) for sae in saes]
        taps = tuple(find_tap(self._model, sae.site) for sae in self._saes)
        for sae, tap in zip(self._saes, taps, strict=True):
            if (width := width_of(tap)) is not None:
                refuse_width(sae, width)
        self._recorder = Recorder(taps)
        self.dtype = str(weights).removeprefix("torch.")
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(self.device.type, 4096)
        apart = passes.why_apart(self._model) if share_prompt else ""
        if apart:
            self.notes += (f"{apart}: prompts run twice per pair",)
        self.shares_prompt = share_prompt and not apart
        if self._model.base_model is self._model:
            raise ModelError(f"{folder}: a model without a separate head. Use --backend mlx.")
        self._head = Head(self._model, self.device)

    def score(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        """Raises ModelError when a single response is too much for the memory."""
        todo = passes.units(pairs, share=self.shares_prompt)
        scores: dict[int, ResponseScore] = {}
        while todo:
            batch = passes.next_batch(todo, self.tokens_per_batch)
            todo = todo[len(batch) :]
            found = self._try(batch)
            if found is None:
                todo = [*self._back_off(batch), *todo]
            else:
                rows = (row for unit in batch for row in unit)
                scores |= {row.number: score for row, score in zip(rows, found, strict=True)}
        return [(scores[2 * n], scores[2 * n + 1]) for n in range(len(pairs))]

    def activations(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = []
        for unit in passes.units(pairs, share=False):  # one by one: they are few and short
            with torch.no_grad():
                _, places = passes.run(self._model, [unit], self.device)
                at = (self._put(places[0]), self._put(places[1]))
                rows = [self._recorder.rows(tap, at).float() for tap in self._recorder.taps]
            found.append([site.cpu().numpy() for site in rows])
            self._recorder.clear()
        return [np.concatenate(site) for site in zip(*found, strict=True)]

    def _try(self, batch: Sequence[passes.Unit]) -> list[ResponseScore] | None:
        """The scores, or None when memory ran out (what the attempt held is free by then)."""
        try:
            with torch.no_grad():
                return self._score(batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not any(text in str(error).lower() for text in OUT_OF_MEMORY):
                raise
            return None
        finally:
            self._recorder.clear()

    def _back_off(self, batch: Sequence[passes.Unit]) -> Sequence[passes.Unit]:
        """What to try in the batch's place, with half its tokens from now on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1 and len(batch[0]) == 1:
            longest = len(batch[0][0].tokens)
            raise ModelError(
                f"{self.device}: out of memory on a single response of {longest} tokens. "
                "Lower --max-seq-length, or use a smaller --dtype or another --device."
            )
        if len(batch) == 1:
            return [(row,) for row in batch[0]]  # a pair: its responses one by one
        self.tokens_per_batch = passes.width(batch) * (len(batch) // 2)
        return batch

    def _score(self, batch: Sequence[passes.Unit]) -> list[ResponseScore]:
        out, places = passes.run(self._model, batch, self.device)
        at = (self._put(places[0]), self._put(places[1]))  # [R] each
        responses = [row.response for unit in batch for row in unit]
        lengths = [len(response) for response in responses]
        targets = self._put(np.concatenate(responses).astype(np.int64))
        logps = self._head.token_logps(type(out), out.last_hidden_state[at], targets)
        sites = [self._recorder.rows(tap, at).split(lengths) for tap in self._recorder.taps]
        features = [
            torch.stack([pooled(sae, rows) for rows in site]).cpu().numpy()  # [B, F]
            for sae, site in zip(self._saes, sites, strict=True)
        ]
        by_row = np.split(logps, np.cumsum(lengths)[:-1])
        return [
            ResponseScore(
                logps=float(part.sum()),
                tokens=length,
                features=tuple(SparseFeatures.from_dense(dense[i]) for dense in features),
            )
            for i, (length, part) in enumerate(zip(lengths, by_row, strict=True))
        ]

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
