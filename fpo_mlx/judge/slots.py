"""Many answers at once: rows of a fixed batch, each at its own position, refilled as they finish.

A prompt runs once; the keys and values it leaves are given to each of its answers. A row is filled
again in the step after it has ended. Every row begins at column 0 of its caches, and rows and
columns are settled before the first step, so that no answer depends on when another one ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.core.logprobs import log_softmax, pick
from fpo_mlx.model.policy import mask_axes, plain_caches
from fpo_mlx.model.taps import PrefixCache

ROWS = 32  # answers at once
PREFILL = 1024  # prompt tokens run at once
COLUMNS = 64  # widths of caches are multiples of this
COLUMN_COST = 1 / 1024  # of a step without attention; measured on SmolLM2-135M, less in larger ones
CLEAR_EVERY = 256  # steps between two calls that give cached buffers back

Prefix = list[tuple[mx.array, ...]]  # per cache () or keys and values, [1, heads, P - 1, d]


@dataclass(frozen=True)
class Answer:
    """One sampled response. n tokens, an end of turn included."""

    prompt: np.ndarray  # int32 [P]
    tokens: np.ndarray  # int32 [n]
    entropies: np.ndarray  # float64 [n], nats, of the distribution each token was drawn from
    finished: bool  # the model ended it itself
    logp: float = 0.0  # nats, sum over its tokens at temperature 1


@dataclass(frozen=True)
class Asked:
    """A prompt and the noise of each answer that is wanted of it."""

    prompt: np.ndarray  # int32 [P]
    noises: Sequence[tuple[int, ...]]  # numbers that the answer's random bits are made of
    known: bool = False  # its answers are there already: it is counted where widths are settled


@dataclass
class _Row:
    """One answer in work."""

    asked: int  # which prompt
    answer: int  # which of its answers
    key: np.ndarray  # uint32 [2]
    steps: int = 0  # tokens asked for; those that were read are in `tokens`
    tokens: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    logp: float = 0.0
    ended: bool = False

    def close(self, prompt: np.ndarray, finished: bool) -> Answer:
        tokens = np.array(self.tokens, dtype=np.int32)
        entropies = np.array(self.entropies, dtype=np.float64)
        return Answer(np.asarray(prompt, np.int32), tokens, entropies, finished, self.logp)


def row_axes(model: nn.Module) -> int:
    """`policy.mask_axes` of rows of which each has its own next token; 0 where they cannot run."""
    count = plain_caches(model)

    def attempt(rows: int, axes: int) -> None:
        caches = [RowCache(rows, COLUMNS, axes) for _ in range(count)]
        model(mx.zeros((rows, 1), dtype=mx.int32), cache=caches)

    return mask_axes(attempt) if count else 0


def noise_key(noise: Sequence[int]) -> np.ndarray:
    """uint32 [2], of which the key of each position is made."""
    return np.random.SeedSequence(tuple(noise)).generate_state(2, np.uint32)


def position_keys(keys: np.ndarray, positions: np.ndarray) -> mx.array:
    """keys: uint32 [B, 2], positions: [B] -> uint32 [B, 2]."""
    return mx.array(keys ^ np.stack([np.zeros_like(positions), positions], 1).astype(np.uint32))


def entropy(logits: mx.array) -> mx.array:
    """Entropy of each row's whole distribution, nats. [r, V] -> [r]."""
    logps = log_softmax(logits)
    return -(mx.exp(logps) * mx.maximum(logps, -1e4)).sum(axis=-1)  # 0 * -inf is no number


def draw(logps: mx.array, keys: mx.array, temp: float) -> mx.array:
    """One token per row, each row by its own key. logps: [B, V], keys: uint32 [B, 2] -> [B]."""
    if not temp:
        return mx.argmax(logps, axis=-1)
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logps / temp, keys)


class RowCache:
    """Keys and values of B rows, each at its own offset, in S columns; written in place.

    The part of mlx-lm's cache protocol that its attention modules use.
    """

    def __init__(self, rows: int, columns: int, mask_axes: int = 4) -> None:
        self._axes = mask_axes
        self.offset = mx.zeros((rows,), dtype=mx.int32)  # position of each row's next token
        self.columns = columns
        self._held: tuple[mx.array, ...] = ()  # keys and values, [B, heads, S, d]

    def fill(self, row: int, prefix: tuple[mx.array, ...]) -> None:
        """Begin a row behind these keys and values, [1, heads, P - 1, d]; () for none."""
        length = prefix[0].shape[2] if prefix else 0
        self.offset[row] = length
        if not prefix:
            return
        self._held = self._held or self._room(prefix)
        for held, part in zip(self._held, prefix, strict=True):
            held[row, :, :length] = part[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        new = (keys, values)
        held = self._held or self._room(new)
        at = mx.minimum(self.offset, self.columns - 1)[:, None, None, None]  # an idle row stays
        self._held = tuple(
            mx.put_along_axis(old, mx.broadcast_to(at, part.shape), part, axis=2)
            for old, part in zip(held, new, strict=True)
        )
        self.offset = self.offset + 1
        return self._held

    def keys_and_values(self) -> tuple[mx.array, ...]:
        return self._held

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None):
        """Boolean [B, 1, 1, S] (or one axis more): the columns up to each row's own."""
        del n, return_array  # one token per step
        columns = mx.arange(self.columns)
        last = self.offset.reshape(-1, *[1] * (self._axes - 1))
        mask = columns <= last
        return mask if window_size is None else mask & (columns > last - window_size)

    @property
    def state(self) -> tuple[mx.array, ...]:
        return (self.offset, *self._held)

    def _room(self, like: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        rows = self.offset.shape[0]
        return tuple(
            mx.zeros((rows, part.shape[1], self.columns, part.shape[3]), part.dtype)
            for part in like
        )


def width_for(prompt: int, max_tokens: int) -> int:
    """Columns that a prompt and its answer get: four sizes an octave, so that few are wasted."""
    need = prompt + max_tokens
    step = COLUMNS
    while step * 8 < need:
        step *= 2
    return -(-need // step) * step


def work_order(asked: Sequence[Asked]) -> list[int]:
    """The prompts that want answers, longest first."""
    wanting = (i for i, one in enumerate(asked) if not one.known)
    return sorted(wanting, key=lambda i: (-len(asked[i].prompt), i))


def column_groups(asked: Sequence[Asked], max_tokens: int, rows: int) -> list[tuple[int, set[int]]]:
    """(columns, prompts) of the batches that run one after the other, widest first.

    A batch ends with idle rows, and each column costs time in every step: of all ways to put
    neighbouring widths together the cheapest one is taken. Known prompts count, too, so that a run
    that goes on has the widths it began with.
    """
    widths: dict[int, set[int]] = {}
    for i in sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt)):
        widths.setdefault(width_for(len(asked[i].prompt), max_tokens), set()).add(i)
    columns = list(widths)
    counts = [sum(len(asked[i].noises) for i in widths[width]) for width in columns]
    best: list[tuple[float, list[int]]] = [
        (0.0, [])
    ]  # cost of the first widths, where groups begin
    for stop in range(1, len(columns) + 1):
        ways = (
            (best[begin][0] + _cost(columns[begin], sum(counts[begin:stop]), rows), begin)
            for begin in range(stop)
        )
        cost, begin = min(ways)
        best.append((cost, [*best[begin][1], begin]))
    begins = best[-1][1]
    return [
        (columns[begin], set().union(*(widths[width] for width in columns[begin:stop])))
        for begin, stop in zip(begins, [*begins, len(columns)][1:], strict=True)
    ]


def _cost(columns: int, answers: int, rows: int) -> float:
    return -(-answers // rows) * (1 + COLUMN_COST * columns)


def answers(
    model: nn.Module,
    asked: Sequence[Asked],
    settings: Sampling,
    end: Collection[int],
    *,
    rows: int = ROWS,
    entropies: bool = False,
) -> Iterator[tuple[int, int, Answer]]:
    """(prompt's number, answer's number, answer) in the order in which they end.

    end: tokens that end an answer. `entropies` measures them, at one more pass over the logits.
    """
    order = work_order(asked)
    for columns, prompts in column_groups(asked, settings.max_tokens, rows):
        batch = _Batch(model, asked, settings, end, rows, columns, entropies)
        yield from batch.run([i for i in order if i in prompts])


class _Batch:
    """Rows of one width, and the prompts that wait for them."""

    def __init__(
        self, model: nn.Module, asked: Sequence[Asked], settings: Sampling, end: Collection[int],
        rows: int, columns: int, entropies: bool,
    ) -> None:  # fmt: skip
        self._model, self._asked, self._settings, self._end = model, asked, settings, end
        axes = row_axes(model)
        self._caches = [RowCache(rows, columns, axes) for _ in range(plain_caches(model))]
        self._rows: list[_Row | None] = [None] * rows
        self._tokens = mx.zeros((rows,), dtype=mx.int32)  # [B], the last of each row
        self._entropies = entropies
        self._prefix: tuple[int, Prefix] = (-1, [])  # of the prompt whose answers begin now

    def run(self, order: Sequence[int]) -> Iterator[tuple[int, int, Answer]]:
        """A step is on its way while the host reads the one before it."""
        waiting = deque((i, j) for i in order for j in range(len(self._asked[i].noises)))
        launched = None
        steps = 0
        while waiting or launched is not None or any(self._rows):
            self._refill(waiting)
            coming = self._launch() if any(self._rows) else None
            if launched is not None:
                yield from self._read(*launched)
            launched = coming
            steps += 1
            if steps % CLEAR_EVERY == 0:
                mx.clear_cache()

    def _refill(self, waiting: deque[tuple[int, int]]) -> None:
        first = np.full(len(self._rows), -1, np.int32)
        for at, row in enumerate(self._rows):
            if row is not None or not waiting:
                continue
            i, j = waiting.popleft()
            prompt = self._asked[i].prompt
            if self._prefix[0] != i:
                self._prefix = (i, prefill(self._model, prompt))
            for cache, prefix in zip(self._caches, self._prefix[1], strict=True):
                cache.fill(at, prefix)
            first[at] = prompt[-1]
            self._rows[at] = _Row(i, j, noise_key(self._asked[i].noises[j]))
        if not waiting:
            self._prefix = (-1, [])
        if (first >= 0).any():  # a new array: the old one is still to be read
            begin = mx.array(first)
            self._tokens = mx.where(begin >= 0, begin, self._tokens.astype(mx.int32))

    def _launch(self) -> tuple[list[_Row | None], tuple[mx.array, ...]]:
        """One token of every row, and whose rows they are."""
        rows = self._rows[:]
        nobody = np.zeros(2, np.uint32)
        keys = np.stack([nobody if row is None else row.key for row in rows])
        positions = np.array([0 if row is None else row.steps for row in rows])
        logits = self._model(self._tokens[:, None], cache=self._caches)[:, -1]  # [B, V]
        logps = log_softmax(logits)
        self._tokens = draw(logps, position_keys(keys, positions), self._settings.temp)
        out = (self._tokens, pick(logps, self._tokens))
        if self._entropies:
            out += (entropy(logps / (self._settings.temp or 1.0)),)
        mx.async_eval(*out, *(array for cache in self._caches for array in cache.state))
        for at, row in enumerate(rows):
            if row is not None:
                row.steps += 1
                if row.steps == self._settings.max_tokens:  # known before it is read
                    self._rows[at] = None
        return rows, out

    def _read(
        self, rows: Sequence[_Row | None], out: tuple[mx.array, ...]
    ) -> Iterator[tuple[int, int, Answer]]:
        columns = [np.array(array).tolist() for array in out]
        for at, row in enumerate(rows):
            if row is None or row.ended:
                continue
            row.tokens.append(int(columns[0][at]))
            row.logp += columns[1][at]
            if self._entropies:
                row.entropies.append(columns[2][at])
            finished = row.tokens[-1] in self._end
            if finished or len(row.tokens) == self._settings.max_tokens:
                row.ended = True
                if self._rows[at] is row:
                    self._rows[at] = None
                yield row.asked, row.answer, row.close(self._asked[row.asked].prompt, finished)


def prefill(model: nn.Module, prompt: np.ndarray) -> Prefix:
    """Keys and values of all but the prompt's last token, in pieces of PREFILL."""
    count = plain_caches(model)
    prefix: Prefix = [()] * count
    for start in range(0, len(prompt) - 1, PREFILL):
        caches = [PrefixCache(part) for part in prefix]
        piece = prompt[start : min(start + PREFILL, len(prompt) - 1)]
        model(mx.array(piece[None]), cache=caches)  # its logits are never evaluated
        prefix = [cache.keys_and_values() for cache in caches]
        mx.eval(prefix)
    return prefix
