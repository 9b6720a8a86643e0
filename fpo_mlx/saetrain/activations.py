"""Activations of a model at a site: only the blocks up to the site are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.errors import ModelError
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.model.heads import find_backbone
from fpo_mlx.model.policy import fresh_caches, needed_caches, pad
from fpo_mlx.model.taps import Tap, finish, norm_and_residual, refuse_streams, tap_point
from fpo_mlx.model.trees import blocks_of
from fpo_mlx.records import Site
from fpo_mlx.saetrain.texts import Document

BATCH_TOKENS = 4096  # padded tokens run at once
OUTLIER = 10.0  # times the median norm of a calibration sample: positions beyond are left out


@dataclass(frozen=True)
class Reader:
    """A truncated model with one tap. `limit`: the largest norm that still counts.

    ranks: the processes that run the documents together; each gets all rows.
    """

    backbone: nn.Module
    tap: Tap
    site: Site
    eps: float
    residual: float
    limit: float = float("inf")
    ranks: Ranks = Ranks()
    caches: int = 0  # that every pass is given
    blocks: int = 0  # of a model that asks for the cache of a block behind the cut; else 0

    def rows(self, documents: Sequence[Document]) -> np.ndarray:
        """Activations of all kept positions, in the documents' order: float32 [R, D].

        The same documents give the same bits, in however many processes. In memory are these rows
        and one batch. Raises ModelError for values that are not finite.
        """
        counts = [int(document.keep.sum()) for document in documents]
        ends, total = np.cumsum(counts), sum(counts)
        rows, finite = np.zeros((0, 0), dtype=np.float32), True
        every = batches([len(document.tokens) for document in documents])
        for batch in every[self.ranks.rank :: self.ranks.size]:
            values = self._hidden([documents[i].tokens for i in batch])
            if not rows.shape[1]:  # the width is known from the first batch on
                rows = np.zeros((total, values.shape[2]), dtype=np.float32)
            for row, i in zip(values, batch, strict=True):
                kept = row[: len(documents[i].tokens)][documents[i].keep]
                rows[ends[i] - counts[i] : ends[i]] = kept
                finite = finite and bool(np.isfinite(kept).all())
            if not finite:
                break
        if self.ranks.largest(int(not finite)):
            raise ModelError(
                f"the {self.site} has values that are not finite; convert the model to bfloat16 or "
                "float32 (float16 overflows), or choose another --layer."
            )
        rows = self._of_all(rows, total)
        return rows if self.limit == float("inf") else within(rows, self.limit)

    def _of_all(self, rows: np.ndarray, total: int) -> np.ndarray:
        """rows: float32 [total, D], zeros of documents that are another process's; [0, 0]: all."""
        if self.ranks.size == 1:
            return rows
        width = self.ranks.largest(rows.shape[1])
        rows = rows if rows.shape[1] else np.zeros((total, width), dtype=np.float32)
        for at in range(0, total, BATCH_TOKENS):
            part = slice(at, at + BATCH_TOKENS)
            rows[part] = self.ranks.sum([mx.array(rows[part])])[0]
        return rows

    def _hidden(self, sequences: list[np.ndarray]) -> np.ndarray:
        """The site's values [B, L, D] float32; what follows the site is never computed."""
        tokens = pad(sequences)
        with self.tap.recording() as seen:
            self.backbone(tokens, cache=fresh_caches(self.caches) or [None] * self.blocks or None)
        refuse_streams(seen[-1], tokens, self.site)
        values = np.array(finish(seen[-1].astype(mx.float32), self.site, self.eps, self.residual))
        mx.clear_cache()
        return values


def norms(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", rows, rows))


def within(rows: np.ndarray, limit: float) -> np.ndarray:
    """The rows [R, D] whose norm is at most `limit`, moved to the front of `rows`: a view."""
    end = 0
    for at in range(0, len(rows), BATCH_TOKENS):
        block = rows[at : at + BATCH_TOKENS]
        good = block[norms(block) <= limit]
        rows[end : end + len(good)] = good
        end += len(good)
    return rows[:end]


def batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of neighbours in length, at most `tokens` padded tokens together."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if made and lengths[i] * (len(made[-1]) + 1) <= tokens:
            made[-1].append(i)
        else:
            made.append([i])
    return made


def open_reader(model: nn.Module, config: dict, site: Site) -> Reader:
    """Cut the model behind the site's block and tap it. The model is of no other use afterwards.

    Raises ModelError for a block or a site that the model does not have.
    """
    blocks = blocks_of(model)
    if not 0 <= site.layer < len(blocks):
        raise ModelError(f"--layer {site.layer}: the model's blocks are 0 to {len(blocks) - 1}.")
    tap = Tap(*tap_point(blocks[site.layer], site))
    backbone, caches = find_backbone(model), needed_caches(model)
    for name, value in backbone.items():
        if isinstance(value, list) and value and value[0] is blocks[0]:
            backbone[name] = value[: site.layer + 1]
    return _probed(
        Reader(backbone, tap, site, *norm_and_residual(config), caches=caches), len(blocks)
    )


def _probed(reader: Reader, blocks: int) -> Reader:
    """With the caches that the model's code wants. Every process raises here, or none does."""
    probe = [np.zeros(2, dtype=np.int32)]
    try:
        reader._hidden(probe)
    except IndexError:
        reader = replace(reader, blocks=blocks)
        try:
            reader._hidden(probe)
        except (AttributeError, IndexError, TypeError) as error:
            raise ModelError(
                f"--layer {reader.site.layer}: mlx-lm's code of this model does not run without "
                "the blocks behind it. Choose a higher --layer."
            ) from error
    return reader


def norm_limit(rows: np.ndarray) -> float:
    """The stated rule: a position whose norm exceeds OUTLIER medians is left out."""
    return OUTLIER * float(np.median(norms(rows)))
