"""A model that speaks token by token, its features steered and shown."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.core import features as F
from fpo_mlx.judge import slots
from fpo_mlx.machine.upstream import leaning_on
from fpo_mlx.model.taps import Change, Tap, finish, refuse_splice, tap_point, unfinish, without
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
    """A model with, perhaps, one SAE's site tapped. One object per model: the tap changes it.

    Keys and values stay between two prompts: of one that begins as the last one did (the next turn
    of a conversation) only what is new is run.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site | None = None,
        encoder: F.Encoder | None = None,
        norm_eps: float = 1e-6,
        residual: float = 1.0,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """norm_eps, residual: of the model's config, for what the SAE reads (`taps.finish`).

        tell: hears, once, why a conversation has to be run anew.
        """
        self.model, self._site, self._encoder = model, site, encoder
        self._eps, self._residual = norm_eps, residual
        self._tap = Tap(*tap_point(blocks_of(model)[site.layer], site)) if site else None
        self._kept: tuple[list[Any], list[int]] | None = None  # caches, the tokens that they hold
        self._tell: Callable[[str], None] | None = tell

    def steer(self, change: Change | None) -> None:
        """change: of what the SAE reads. Raises: ModelError where that is read elsewhere, too."""
        if self._tap is None or self._site is None:
            return
        site, residual = self._site, self._residual
        self._tap.lasting[:] = []
        if change is not None:
            refuse_splice(site)

            def whole(array: mx.array) -> mx.array:
                rows = finish(array.astype(mx.float32), site, self._eps, residual)
                return unfinish(change(rows), site, residual)

            self._tap.lasting[:] = [whole]
        self._kept = None  # of other activations from here on

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

        caches, known = self._begun(prompt.tolist())

        def tokens() -> Iterator[Spoken]:
            steps = generate_step(
                mx.array(prompt[known:]), self.model, max_tokens=settings.max_tokens,
                sampler=sampler, prompt_cache=caches,
            )  # fmt: skip
            held = prompt.tolist()
            for number, (token, _) in enumerate(steps):
                held.append(int(token))  # it has been run when it comes
                self._kept = (caches, held)
                yield Spoken(int(token), self._strongest(rows[number], show) if show else ())
                if int(token) in end:
                    return
                self._kept = None  # until the next one stands: a step may break off
            self._kept = (caches, held)

        if not show or self._tap is None:
            yield from tokens()
            return
        with self._tap.recording() as recorded:
            seen = recorded
            yield from tokens()

    def _begun(self, prompt: list[int]) -> tuple[list[Any], int]:
        """(caches, how many tokens of the prompt they hold): as many as it shares with the last.

        A cache that cannot be cut back (a window that is full, a recurrent state) serves only
        where nothing of it has to go.
        """
        with leaning_on("mlx-lm", "its caches, which a conversation keeps"):
            from mlx_lm.models.cache import (
                can_trim_prompt_cache,
                make_prompt_cache,
                trim_prompt_cache,
            )

        kept, self._kept = self._kept, None
        if kept is not None:
            caches, held = kept
            pairs = zip(held, prompt[:-1], strict=False)  # the last one is run: it predicts
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            shared = min(len(held), len(prompt) - 1) if shared is None else shared
            surplus = len(held) - shared
            if surplus == 0 or (shared and can_trim_prompt_cache(caches)):
                if surplus:
                    trim_prompt_cache(caches, surplus)
                return caches, shared
            if shared and self._tell is not None:
                self._tell(
                    "this model's cache cannot be cut back, so each turn runs the whole "
                    "conversation anew (slower; the answers are the same)"
                )
                self._tell = None
        return make_prompt_cache(self.model), 0

    def _strongest(self, row: mx.array, count: int) -> tuple[tuple[int, float], ...]:
        assert self._encoder is not None
        assert self._site is not None
        read = finish(row, self._site, self._eps, self._residual)
        acts = np.array(F.encode(self._encoder, read))[0]
        order = np.argsort(-np.abs(acts), kind="stable")[:count]
        return tuple((int(i), float(acts[i])) for i in order if acts[i])
