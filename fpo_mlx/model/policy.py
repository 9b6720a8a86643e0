"""A model as the objective sees it: token pairs in, hidden rows at response positions out.

Chosen and rejected share their prompt. Where the model's caches are plain keys and values, the
prompt runs once and both responses continue from its keys and values; otherwise whole sequences
run side by side. Where launches count, the pairs of a micro batch share these passes. The results
are equal (a test holds it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.machine import device
from fpo_mlx.machine.upstream import leaning_on
from fpo_mlx.model.heads import split, vocab_size
from fpo_mlx.model.taps import (
    PrefixCache,
    Tap,
    checkpoint_block,
    finish,
    norm_and_residual,
    refuse_splice,
    refuse_streams,
    tap_point,
    unfinish,
    without,
)
from fpo_mlx.model.trees import blocks_of, float_dtype
from fpo_mlx.records import Projection, Site, TokenPair

Splice = Callable[[mx.array], mx.array]  # [n, D_in] -> [n, D_in]


@dataclass(frozen=True)
class Rows:
    """Response positions of 2B responses (c0, r0, c1, r1, …), one after the other: R rows.

    A response position is one whose next token is a response token.
    """

    hidden: mx.array  # [R, D] after the final norm
    tapped: tuple[mx.array, ...]  # per site [R, D_in]


@dataclass(frozen=True)
class Layout:
    """Where each response's rows lie, and the tokens that they predict."""

    lengths: np.ndarray  # int [2B]
    targets: mx.array  # int32 [R]

    @staticmethod
    def of(pairs: Sequence[TokenPair]) -> Layout:
        responses = [response for pair in pairs for response in pair.responses]
        lengths = np.array([len(response) for response in responses])
        return Layout(lengths, mx.array(np.concatenate(responses).astype(np.int32)))

    def sums(self) -> mx.array:
        """[2B, R]: 1 on a response's own rows."""
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return mx.array((owner[None, :] == np.arange(len(self.lengths))[:, None]), mx.float32)

    def totals(self, values: mx.array) -> mx.array:
        """Of [R] values, nats among them, the sum over each response: [2B].

        No product of matrices: some GPUs round its factors, and some kernels do not.
        """
        return (self.sums() * values).sum(axis=-1)

    def means(self) -> mx.array:
        """[2B, R]: 1 / |y| on a response's own rows."""
        return self.sums() / mx.array(self.lengths.astype(np.float32))[:, None]

    def rows(self, response: int) -> slice:
        start = int(self.lengths[:response].sum())
        return slice(start, start + int(self.lengths[response]))


class Policy:
    """A loaded model with taps at the SAEs' sites. One object per model: taps change the model."""

    def __init__(
        self,
        model: nn.Module,
        config: dict,
        sites: Sequence[Site] = (),
        *,
        share_prompt: bool = True,
        grad_checkpoint: bool = False,
        projections: Sequence[Projection] = (),
    ) -> None:
        """projections: what every pass goes on without; the taps see what is left.

        Raises: SaeError, ModelError for a site that this model does not have.
        """
        n = len(blocks_of(model))
        changed = [one.site for one in projections]
        for site in (*sites, *changed):
            if not 0 <= site.layer < n:
                raise SaeError(
                    f"the SAE reads the {site}, but the model's blocks are 0 to {n - 1}. "
                    "Use an SAE for this model, or give --layer."
                )
        self.model, self.sites = model, tuple(sites)
        self.vocab_size = vocab_size(model, config)
        self.norm_eps, self._residual = norm_and_residual(config)
        self.dtype = float_dtype(model)  # that the model computes in
        self._caches, self._needed = plain_caches(model), needed_caches(model)
        self.shares_prompt = share_prompt and self._caches > 0
        if grad_checkpoint:  # before the taps, which must lie outside
            tapped = (*self.sites, *changed)
            inner = {s.layer for s in tapped if s.kind not in ("resid_pre", "resid_post")}
            for i, block in enumerate(blocks_of(model)):
                if i not in inner:
                    checkpoint_block(block)
        self._taps = [Tap(*tap_point(blocks_of(model)[site.layer], site)) for site in self.sites]
        self._project(projections)
        self.backbone, self.head = split(model, config)

    def _project(self, projections: Sequence[Projection]) -> None:
        for one in projections:
            refuse_splice(one.site)
            own = [t for t, s in zip(self._taps, self.sites, strict=True) if s == one.site]
            for tap in own or [Tap(*tap_point(blocks_of(self.model)[one.site.layer], one.site))]:
                tap.lasting.append(without(mx.array(one.basis)))

    def rows(self, pairs: Sequence[TokenPair]) -> Rows:
        """Hidden rows at the response positions of all pairs, in `Layout` order."""
        if not self.shares_prompt:
            return self._side_by_side(pairs)
        if len(pairs) > 1 and device.here().together and self._row_axes:
            return self._together(pairs)
        parts = [self._shared(pair) for pair in pairs]
        tapped = zip(*(part.tapped for part in parts), strict=True)
        return Rows(
            mx.concatenate([part.hidden for part in parts]),
            tuple(mx.concatenate(list(site)) for site in tapped),
        )

    def answer_rows(
        self, prompt: np.ndarray, response: np.ndarray, splice: Splice | None = None
    ) -> Rows:
        """Hidden rows at the response positions of one sequence, [|y|, ·], run whole.

        splice: at the first site, the model goes on with what this makes of the site's rows
        [|y|, D_in]. Raises: ModelError for a site where that is not possible.
        """
        tokens, first = np.concatenate([prompt, response[:-1]]), len(prompt) - 1
        span = [(first, len(response))]
        if splice is None:
            return self._run(pad([tokens]), span)
        site = self.sites[0]
        refuse_splice(site)

        def change(array: mx.array) -> mx.array:  # [1, L, D_in]
            rows = finish(array[0, first:], site, self.norm_eps, self._residual)
            put = unfinish(splice(rows), site, self._residual)
            return mx.concatenate([array[0, :first], put.astype(array.dtype)])[None]

        with self._taps[0].intervening(change):
            return self._run(pad([tokens]), span)

    def _shared(self, pair: TokenPair) -> Rows:
        """Prompt once: the rejected response uses the keys and values that the chosen one's has.

        Two passes without padding: prompt and chosen response, then the rejected response.
        """
        before = len(pair.prompt) - 1  # the prompt's last token predicts: each response has its own
        caches = [PrefixCache() for _ in range(self._caches)]
        whole = np.concatenate([pair.prompt, pair.chosen[:-1]])
        chosen = self._run(pad([whole]), [(before, len(pair.chosen))], caches)
        prefixes = [cache.own if before else () for cache in caches]
        prefixes = [tuple(array[:, :, :before] for array in own) for own in prefixes]
        tail = np.concatenate([pair.prompt[-1:], pair.rejected[:-1]])
        again = [PrefixCache(prefix) for prefix in prefixes]
        rejected = self._run(pad([tail]), [(0, len(tail))], again)
        return Rows(
            mx.concatenate([chosen.hidden, rejected.hidden]),
            tuple(
                mx.concatenate([a, b]) for a, b in zip(chosen.tapped, rejected.tapped, strict=True)
            ),
        )

    @cached_property
    def _row_axes(self) -> int:
        """`mask_axes` of rows behind prefixes of several lengths."""

        def attempt(rows: int, axes: int) -> None:
            tokens = mx.zeros((rows, 2), mx.int32)
            padding = mx.minimum(mx.arange(rows), 1)
            before = [PrefixCache() for _ in range(self._caches)]
            self.backbone(tokens, cache=before)
            after = [PrefixCache(cache.own, padding, axes) for cache in before]
            self.backbone(tokens, cache=after)

        training = self.model.training
        self.model.eval()  # a dropout would draw numbers here that a resumed run does not draw
        try:
            return mask_axes(attempt)
        finally:
            self.model.train(training)

    def _together(self, pairs: Sequence[TokenPair]) -> Rows:
        """`_shared` of several pairs in two passes in all, padded on the right.

        The prompts' keys and values end in the same column, where the rejected responses go on.
        """
        before = np.array([len(pair.prompt) - 1 for pair in pairs])
        caches = [PrefixCache() for _ in range(self._caches)]
        whole = [np.concatenate([pair.prompt, pair.chosen[:-1]]) for pair in pairs]
        spans = [(int(n), len(pair.chosen)) for n, pair in zip(before, pairs, strict=True)]
        chosen = self._run(pad(whole), spans, caches)
        width = bucketed(int(before.max()))  # P
        padding = width - before
        columns = mx.array(np.arange(width)[None] - padding[:, None])
        columns = mx.maximum(columns, 0)[:, None, :, None]  # [B, 1, P, 1]
        gaps = mx.array(padding.astype(np.int32))
        again = [
            PrefixCache(tuple(_along(array, columns) for array in cache.own), gaps, self._row_axes)
            if cache.own and before.any()
            else PrefixCache()
            for cache in caches
        ]
        tails = [np.concatenate([pair.prompt[-1:], pair.rejected[:-1]]) for pair in pairs]
        rejected = self._run(pad(tails), [(0, len(tail)) for tail in tails], again)
        order = mx.array(_by_pair(pairs))

        def sorted_rows(first: mx.array, second: mx.array) -> mx.array:
            return mx.take(mx.concatenate([first, second]), order, axis=0)

        return Rows(
            sorted_rows(chosen.hidden, rejected.hidden),
            tuple(map(sorted_rows, chosen.tapped, rejected.tapped)),
        )

    def _side_by_side(self, pairs: Sequence[TokenPair]) -> Rows:
        """Whole sequences, padded on the right: causal attention never looks at padding."""
        spans, inputs = [], []
        for pair in pairs:
            for response in pair.responses:
                inputs.append(np.concatenate([pair.prompt, response[:-1]]))
                spans.append((len(pair.prompt) - 1, len(response)))
        return self._run(pad(inputs), spans)

    def _run(
        self, tokens: mx.array, spans: list[tuple[int, int]], caches: list | None = None
    ) -> Rows:
        """tokens: [n, L]; spans: (start, length) of each sequence's response positions.

        caches: of what the sequences go on from; none where they are whole.
        """
        caches = caches or fresh_caches(self._needed)
        called = leaning_on("mlx-lm", "how a backbone is called and what it asks of a cache")
        with ExitStack() as stack:
            seen = [stack.enter_context(tap.recording()) for tap in self._taps]
            stack.enter_context(called)
            hidden = self.backbone(tokens, cache=caches)  # [n, L, D]
        for record, site in zip(seen, self.sites, strict=True):
            refuse_streams(record[-1], tokens, site)
        width = tokens.shape[1]
        picks = [i * width + s + np.arange(n) for i, (s, n) in enumerate(spans)]
        index = mx.array(np.concatenate(picks).astype(np.int32))

        def gather(array: mx.array) -> mx.array:
            return mx.take(array.reshape(-1, array.shape[-1]), index, axis=0)  # [R, ·]

        tapped = (
            finish(gather(record[-1]), site, self.norm_eps, self._residual)
            for record, site in zip(seen, self.sites, strict=True)
        )
        return Rows(gather(hidden), tuple(tapped))


def pad(sequences: Sequence[np.ndarray]) -> mx.array:
    """Right-pad token sequences to the longest -> int32 [n, L]. What fills is never looked at.

    On a GPU to a multiple of the device's bucket: arrays of few sizes use freed buffers again.
    """
    out = np.zeros((len(sequences), bucketed(max(map(len, sequences)))), dtype=np.int32)
    for row, tokens in zip(out, sequences, strict=True):
        row[: len(tokens)] = tokens
    return mx.array(out)


def bucketed(length: int) -> int:
    """The next multiple of the device's bucket."""
    bucket = device.here().bucket
    return -(-length // bucket) * bucket


def _along(array: mx.array, columns: mx.array) -> mx.array:
    """Each row's own columns. array: [B, heads, L, d], columns: [B, 1, P, 1] -> [B, heads, P, d]"""
    b, heads, _, width = array.shape
    index = mx.broadcast_to(columns, (b, heads, columns.shape[2], width))
    return mx.take_along_axis(array, index, axis=2)


def _by_pair(pairs: Sequence[TokenPair]) -> np.ndarray:
    """Where c0, r0, c1, r1, … lie among all chosen rows and then all rejected: int32 [R]."""
    sizes = np.array([[len(side) for side in pair.responses] for pair in pairs])  # [B, 2]
    starts = np.cumsum(sizes.T.ravel()) - sizes.T.ravel()
    starts = starts.reshape(2, -1).T.ravel()  # of c0, r0, c1, …
    parts = [at + np.arange(n) for at, n in zip(starts, sizes.ravel(), strict=True)]
    return np.concatenate(parts).astype(np.int32)


def mask_axes(attempt: Callable[[int, int], object]) -> int:
    """Axes that a model wants a mask of rows to have: 4, or 5 (Gemma 2 splits its heads).

    0 where it cannot run rows of their own offsets at all. Found out by shapes; nothing is run.
    attempt: (rows, axes) -> a pass with such masks. Two numbers of rows, since one of them may be
    the number of heads, along which a mask of too few axes would be laid without an error.
    """
    for axes in (4, 5):
        try:
            for rows in (3, 5):
                attempt(rows, axes)
        except (ValueError, TypeError, AttributeError):  # of code that expects another cache
            continue
        return axes
    return 0


def plain_caches(model: nn.Module) -> int:
    """How many caches of ordinary keys and values the model keeps; 0 if it has others, too.

    Only with those can a prompt be shared. They are fewer than the blocks where some blocks attend
    to the keys and values of earlier ones (Gemma 4) or have no attention.
    """
    with leaning_on("mlx-lm", "its classes of key-value caches"):
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        caches = make_prompt_cache(model)
    plain = all(type(cache) in (KVCache, RotatingKVCache) for cache in caches)
    return len(caches) if plain and len(caches) <= len(blocks_of(model)) else 0


def needed_caches(model: nn.Module) -> int:
    """How many caches a pass over whole sequences has to be given; 0 where it needs none.

    Where they are fewer than the blocks, some blocks attend to the keys and values of earlier ones,
    and Gemma 3n's find them in the caches alone.
    """
    caches = plain_caches(model)
    return caches if caches < len(blocks_of(model)) else 0


def fresh_caches(count: int) -> list[PrefixCache] | None:
    """As a backbone takes them."""
    return [PrefixCache() for _ in range(count)] or None
