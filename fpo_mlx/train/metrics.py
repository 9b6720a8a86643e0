"""Figures of pairs: pairs with their scores, what a loss says of each, means over a window."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fpo_mlx.core.objectives import PairLosses
from fpo_mlx.intervals import witnesses
from fpo_mlx.machine import device
from fpo_mlx.records import PairScore, TokenPair
from fpo_mlx.train.scoring import FACTS, Measures, Scorer

ROUNDING = 1e-6  # relative, of a response's log-prob; float32 sums were seen to differ by 1e-7
HALF_ROUNDING = 1e-3  # the same where the model computes in half precision


@dataclass(frozen=True)
class ScoredPairs:
    """Token pairs and the reference's scores of them, in the same order."""

    pairs: Sequence[TokenPair]
    refs: Sequence[PairScore]  # may be read from disk at each access

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, positions: Iterable[int]) -> ScoredPairs:
        """Those at these positions, their scores read now: for what fits into memory."""
        chosen = [int(i) for i in positions]
        return ScoredPairs([self.pairs[i] for i in chosen], [self.refs[i] for i in chosen])


@np.errstate(invalid="ignore", over="ignore")  # the guard speaks of what is not finite
def pair_metrics(
    losses: PairLosses, measures: Measures, half: bool = False
) -> dict[str, np.ndarray]:
    """Per-pair values [B] under TRL's metric names; logps and kl are per response, in nats.

    half: the log-probs are those of a model in half precision.
    """
    chosen, rejected = np.array(losses.chosen_rewards), np.array(losses.rejected_rewards)
    logps, lengths = np.array(measures.logps), np.array(measures.lengths)
    per_token = logps / lengths
    ref_per_token = np.array(measures.ref_logps) / lengths
    # a policy that is its reference has margins of rounding's size; those win no pair
    noise = (HALF_ROUNDING if half else ROUNDING) * np.abs(ref_per_token)
    moved = (np.abs(per_token - ref_per_token) > noise).any(axis=0)
    out = {
        "loss": np.array(losses.losses),
        "u": np.array(losses.u),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": ((chosen > rejected) & moved).astype(np.float64),
        "policy_accuracy": (per_token[0] > per_token[1]).astype(np.float64),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
        "logps_per_token/chosen": per_token[0],
        "logps_per_token/rejected": per_token[1],
        "logps_per_token/chosen_change": per_token[0] - ref_per_token[0],
        "logps_per_token/rejected_change": per_token[1] - ref_per_token[1],
    }
    sides_of = {"features": measures.distances, "drift": measures.relative, "kl": measures.kl}
    for name, values in sides_of.items():
        if values is not None:
            sides = np.array(values)
            out |= {f"{name}/chosen": sides[0], f"{name}/rejected": sides[1]}
            out[f"{name}/margin"] = sides[1] - sides[0]
    if measures.log_collisions is not None:
        sides = np.array(measures.log_collisions)
        out |= {"log_collisions/chosen": sides[0], "log_collisions/rejected": sides[1]}
    for name in FACTS:
        out[name] = np.array(getattr(measures, name))
    return out


def measure(
    scorer: Scorer, data: ScoredPairs, size: int = 1, positions: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """`pair_metrics` of every pair, in order, without gradient; `size` pairs at a time.

    positions: only these pairs of the data.
    """
    parts, wanted = [], range(len(data)) if positions is None else positions
    for i in range(0, len(wanted), size):
        some = data.take(wanted[i : i + size])
        losses, measures = scorer.losses(some.pairs, some.refs, grad=False)
        parts.append(pair_metrics(losses, measures, scorer.half))
        device.tidy()
    return joined(parts)


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The values of several batches one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def prompts_of(pairs: Iterable[TokenPair]) -> list[int]:
    """The number of each pair's prompt, in their order."""
    number: dict[bytes, int] = {}
    return [number.setdefault(pair.prompt.tobytes(), len(number)) for pair in pairs]


def witnesses_of(values: Mapping[str, np.ndarray], pairs: Sequence[TokenPair]) -> float:
    """As how many pairs of different prompts the first of these, measured, tell of the accuracy."""
    hits = values["rewards/accuracies"].tolist()
    return witnesses(hits, prompts_of(pairs[: len(hits)]))


def means_of(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a report shows of values per pair: `shown` of their means, the loss among them."""
    return shown({name: float(array.mean()) for name, array in values.items()})


def shown(means: Mapping[str, float]) -> dict[str, float]:
    """What a report shows of the means: not u, and no fact that no row speaks of."""
    return {k: v for k, v in means.items() if k != "u" and v != FACTS.get(k)}


@dataclass
class Window:
    """Sums since the last report; `saved` and `of` let it outlive an interruption."""

    sums: dict[str, float] = field(default_factory=dict)
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0  # before `started`
    notes: list[str] = field(default_factory=list)
    grad_norm: float | None = None  # of the last update that was made
    started: float = field(default_factory=time.perf_counter)

    def saved(self) -> dict[str, Any]:
        """As JSON holds it, exactly: everything but the clock."""
        everything = asdict(self) | {"seconds": self.elapsed()}
        return {k: v for k, v in everything.items() if k != "started"}

    def add(self, values: Mapping[str, np.ndarray], tokens: int, grad_norm: float) -> None:
        for name, array in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(array.sum())
        self.pairs += len(values["loss"])
        self.tokens += tokens
        self.grad_norm = grad_norm

    def means(self) -> dict[str, float]:
        return {name: total / self.pairs for name, total in self.sums.items()}

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started
