"""Which pairs a run looks at, and when: known before it begins, alike on every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from fpo_mlx.config import TrainConfig
from fpo_mlx.data import batches, batches_per_epoch, mirrored, pair_lengths, visited
from fpo_mlx.records import TokenPair


class Order:
    """Of the training pairs. An update's pairs are those of all processes together."""

    def __init__(self, pairs: Sequence[TokenPair], config: TrainConfig) -> None:
        self.pairs, self.config = pairs, config
        self.total = config.iterations(len(pairs))  # iterations of the whole run

    @property
    def count(self) -> int:
        """Updates of the whole run."""
        return self.total // self.config.grad_accumulation_steps

    @property
    def passes(self) -> float:
        """How often the run goes over all pairs; the last update of a pass may be a short one."""
        return self.count / batches_per_epoch(len(self.pairs), self.config.pairs_per_update)

    @cached_property
    def twins(self) -> np.ndarray | None:
        """Of `mirrored`."""
        return mirrored(self.pairs)

    def updates(self, done: int) -> Iterator[np.ndarray]:
        """Positions of the pairs of each update, without end; the first `done` are left out."""
        t = self.config
        # batches of whole updates, so accumulation changes nothing else
        lengths = pair_lengths(self.pairs)
        return batches(lengths, t.pairs_per_update, t.seed, done, self.twins)

    def visited(self) -> np.ndarray:
        """Positions, ascending, of the pairs of all updates up to the last iteration."""
        t, lengths = self.config, pair_lengths(self.pairs)
        return visited(lengths, t.pairs_per_update, t.seed, self.count, self.twins)
