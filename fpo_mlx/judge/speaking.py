"""A model that speaks token by token, its features steered and shown."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.core import features as F
from fpo_mlx.judge import slots
from fpo_mlx.machine.upstream import leaning_on
from fpo_mlx.model.taps import Change, Tap, finish, refuse_splice, tap_point, without
from fpo_mlx.model.trees import blocks_of
from fpo_mlx.records import Projection, Site


@dataclass(frozen=True)
class Spoken:
    """One token. features: (number, activation) of the strongest where it was predicted."""

    token: int
    features: tuple[tuple[int, float], ...] = ()


def steering(w_dec: np.ndarray, site: Site, asked: Mapping[int, float | None]) -> Change:
    """h without the directions that are to go, plus amount * decoder row of those to come.

    w_dec: [F, D]. asked: amount by feature, None to take its direction out. As SAELens steers:
    at every position, in the SAE's own units.
    """
    gone = [feature for feature, amount in asked.items() if amount is None]
    added = np.zeros(w_dec.shape[1], np.float64)
    for feature, amount in asked.items():
        added += (amount or 0.0) * w_dec[feature].astype(np.float64)
    push = mx.array(added.astype(np.float32))
    away = without(mx.array(Projection.of(site, w_dec[gone]).basis)) if gone else None

    def change(array: mx.array) -> mx.array:
        rows = array.astype(mx.float32)
        return (rows if away is None else away(rows)) + push

    return change


class Speaker:
    """A model with, perhaps, one SAE's site tapped. One object per model: the tap changes it."""

    def __init__(
        self,
        model: nn.Module,
        site: Site | None = None,
        encoder: F.Encoder | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        self.model, self._site, self._encoder, self._eps = model, site, encoder, norm_eps
        self._tap = Tap(*tap_point(blocks_of(model)[site.layer], site)) if site else None

    def steer(self, change: Change | None) -> None:
        """Raises: ModelError where the tapped tensor is not all that is read of the site."""
        if self._tap is None or self._site is None:
            return
        if change is not None:
            refuse_splice(self._site)
        self._tap.lasting[:] = [] if change is None else [change]

    def speak(
        self, prompt: np.ndarray, settings: Sampling, end: Collection[int], *, show: int = 0
    ) -> Iterator[Spoken]:
        """The answer's tokens as they come, the one that ends it too. show: features per token."""
        with leaning_on("mlx-lm", "`generate_step`, which answers one prompt"):
            from mlx_lm.generate import generate_step

        key, positions = slots.noise_key((settings.seed, 0))[None], itertools.count()
        seen: list[mx.array] = []
        rows: list[mx.array] = []  # one per token: the position that predicts it

        def sampler(logprobs: mx.array) -> mx.array:
            if seen:
                rows.append(seen[-1][0, -1:])
                seen.clear()
            keys = slots.position_keys(key, np.array([next(positions)]))
            return slots.draw(logprobs, keys, settings.temp)

        def tokens() -> Iterator[Spoken]:
            steps = generate_step(
                mx.array(prompt), self.model, max_tokens=settings.max_tokens, sampler=sampler
            )
            for number, (token, _) in enumerate(steps):
                yield Spoken(int(token), self._strongest(rows[number], show) if show else ())
                if int(token) in end:
                    return

        if not show or self._tap is None:
            yield from tokens()
            return
        with self._tap.recording() as recorded:
            seen = recorded
            yield from tokens()

    def _strongest(self, row: mx.array, count: int) -> tuple[tuple[int, float], ...]:
        assert self._encoder is not None
        assert self._site is not None
        acts = np.array(F.encode(self._encoder, finish(row, self._site, self._eps)))[0]
        order = np.argsort(-np.abs(acts), kind="stable")[:count]
        return tuple((int(i), float(acts[i])) for i in order if acts[i])
