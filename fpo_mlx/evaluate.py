"""Held-out pairs under a policy: accuracy, margins, drift of the features and of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpo_mlx.reports import ScoredPairs, measure
from fpo_mlx.scoring import Scorer

SIDES = ("chosen", "rejected")
RESAMPLES = 1000


@dataclass(frozen=True)
class EvalReport:
    """summary: means over pairs, with 95 % bootstrap intervals; pairs: one record per pair."""

    summary: Mapping[str, Any]
    pairs: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"summary": dict(self.summary), "pairs": list(self.pairs)}


def evaluate(scorer: Scorer, data: ScoredPairs, size: int = 1) -> EvalReport:
    """Score every pair without gradient. Log-probs are sums in nats, lengths in tokens."""
    values = measure(scorer, data, size)
    summary: dict[str, Any] = {"n": len(data)}
    summary |= {name: float(array.mean()) for name, array in values.items()}
    for name in ("rewards/accuracies", "rewards/margins"):
        summary[f"{name}/ci95"] = bootstrap_interval(values[name])
    tokens = np.array([[len(y) for y in pair.responses] for pair in data.pairs]).T  # [2, B]
    summary["perplexity/chosen"] = float(np.exp(-values["logps/chosen"].sum() / tokens[0].sum()))
    summary |= _by_length(values["rewards/accuracies"], tokens)
    records = [_record(i, data, values) for i in range(len(data))]
    return EvalReport(summary, records)


def _record(i: int, data: ScoredPairs, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    pair = data.pairs[i]
    record: dict[str, Any] = {"index": pair.index}
    for side, response, ref in zip(SIDES, pair.responses, data.refs[i], strict=True):
        record[side] = {
            "tokens": len(response),
            "logp": float(values[f"logps/{side}"][i]),
            "ref_logp": float(ref.logps),
        }
        for name, key in (("feature_mse", "features"), ("kl", "kl")):
            if f"{key}/{side}" in values:
                record[side][name] = float(values[f"{key}/{side}"][i])
    return record | {"loss": float(values["loss"][i]), "u": float(values["u"][i])}


def _by_length(accuracies: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Accuracy where the chosen response is longer, and where it is not; None without pairs."""
    longer = tokens[0] > tokens[1]
    groups = {"chosen_longer": accuracies[longer], "chosen_not_longer": accuracies[~longer]}
    out: dict[str, Any] = {"share_chosen_longer": float(longer.mean())}
    for name, group in groups.items():
        out[f"rewards/accuracies/{name}"] = float(group.mean()) if len(group) else None
    return out


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled pairs."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
