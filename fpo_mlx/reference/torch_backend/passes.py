"""One forward pass over some responses: each by itself, or a pair's two behind their prompt.

Padding is on the right, and under a causal mask no position sees the padding behind it. Only the
second half of a shared pass needs a mask: there the prompts' padding lies before the responses.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fpo_mlx.records import TokenPair

PAYS = 0.9  # share a prompt when that leaves at most so much of the tokens to compute
CACHE = ("cache", "past_key_values")  # what transformers calls it since 5.24, and before


@dataclass(frozen=True)
class Row:
    """One response to score: the tokens that go in, and the response that is read off them."""

    number: int
    tokens: np.ndarray  # int32 [P + |y| - 1]: the last token predicts nothing
    response: np.ndarray  # int32 [|y|]

    @property
    def first(self) -> int:
        """The last prompt position: the first whose next token is the response's."""
        return len(self.tokens) - len(self.response)


Unit = tuple[Row, ...]  # one response, or the two of a pair with their prompt in common
At = tuple[np.ndarray, np.ndarray]  # response positions of all rows: (sequence, place), [R] each


def units(pairs: Sequence[TokenPair], *, share: bool) -> list[Unit]:
    """What is to be scored, in an order in which neighbours go well into one batch.

    Response 2n is the chosen one of pair n. share: pairs stay together where that pays. The longest
    come first: they show what memory holds.
    """
    found: list[Unit] = []
    for n, pair in enumerate(pairs):
        rows = tuple(
            Row(2 * n + side, np.concatenate([pair.prompt, response[:-1]]), response)
            for side, response in enumerate(pair.responses)
        )
        apart = sum(len(row.tokens) for row in rows)
        found += [rows] if share and width([rows]) <= PAYS * apart else [(row,) for row in rows]
    return sorted(found, key=lambda unit: (len(unit), -width([unit])))


def width(batch: Sequence[Unit]) -> int:
    """Tokens that each unit of this batch costs, padding included."""
    if len(batch[0]) == 1:
        return max(len(unit[0].tokens) for unit in batch)
    tails = max(len(row.response) for unit in batch for row in unit)
    return max(unit[0].first for unit in batch) + 2 * tails


def next_batch(todo: Sequence[Unit], budget: int) -> Sequence[Unit]:
    """The beginning of `todo` that fits into so many tokens; one unit at least, all of a kind."""
    count = 1
    while count < len(todo) and len(todo[count]) == len(todo[0]):
        if (count + 1) * width(todo[: count + 1]) > budget:
            break
        count += 1
    return todo[:count]


def why_apart(model: Any) -> str:
    """Why a prompt cannot be run once for both responses; empty where it can.

    It can where every block keeps ordinary keys and values, and transformers has what `_continue`
    asks of it.
    """
    try:
        from transformers.cache_utils import DynamicCache, DynamicLayer
    except ImportError as error:
        return f"this version of transformers has other caches than those known here ({error})"
    if not hasattr(DynamicCache, "batch_repeat_interleave"):
        return "this version of transformers has no DynamicCache.batch_repeat_interleave"
    takes = inspect.signature(model.base_model.forward).parameters
    absent = [name for name in ("position_ids", "attention_mask") if name not in takes]
    if cache_argument(model) is None:
        absent.append(" or ".join(CACHE))
    if absent:
        return f"{type(model.base_model).__name__} takes no {', no '.join(absent)}"
    layers = DynamicCache(config=model.config).layers
    if layers and all(type(layer) is DynamicLayer for layer in layers):
        return ""
    return "this model's caches are not plain keys and values"


def cache_argument(model: Any) -> str | None:
    """What the backbone calls the cache that it continues; None if nothing known here."""
    takes = inspect.signature(model.base_model.forward).parameters
    return next((name for name in CACHE if name in takes), None)


def run(model: Any, batch: Sequence[Unit], device: torch.device) -> tuple[Any, At]:
    """The backbone's output of the last pass, and where the responses' positions lie in it."""
    rows = [row for unit in batch for row in unit]
    lengths = [len(row.response) for row in rows]
    owner = np.repeat(np.arange(len(rows)), lengths)
    if len(batch[0]) == 1:
        out = model.base_model(input_ids=_padded([r.tokens for r in rows], device), use_cache=False)
        return out, (owner, np.concatenate([np.arange(r.first, len(r.tokens)) for r in rows]))
    out = _continue(model, batch, rows, device)
    return out, (owner, np.concatenate([np.arange(length) for length in lengths]))


def _continue(model: Any, batch: Sequence[Unit], rows: list[Row], device: torch.device) -> Any:
    """All prompts but their last tokens once, then all responses behind them."""
    from transformers import DynamicCache

    before = _padded([unit[0].tokens[: unit[0].first] for unit in batch], device)  # [B, P]
    cache = DynamicCache(config=model.config)
    behind = {cache_argument(model): cache, "use_cache": True}
    model.base_model(input_ids=before, **behind)
    cache.batch_repeat_interleave(2)
    tails = _padded([row.tokens[row.first :] for row in rows], device)  # [2B, T]
    firsts = torch.tensor([row.first for row in rows], device=device)  # [2B]
    places = torch.arange(tails.shape[1], device=device)
    seen = torch.arange(before.shape[1], device=device) < firsts[:, None]  # [2B, P]
    return model.base_model(
        input_ids=tails,
        attention_mask=torch.cat([seen, torch.ones_like(tails, dtype=torch.bool)], dim=1),
        position_ids=firsts[:, None] + places,
        **behind,
    )


def _padded(sequences: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """int64 [n, L], padded on the right with what nobody looks at."""
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(tokens).to(device)
