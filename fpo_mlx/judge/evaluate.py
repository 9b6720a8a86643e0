"""Held-out pairs under a policy: accuracy, margins, drift of the features and of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fpo_mlx.intervals import wilson, witnesses
from fpo_mlx.judge.sampling import Answer, distinct_n
from fpo_mlx.records import BASE, result_file, shown_name
from fpo_mlx.train.metrics import ScoredPairs, measure, prompts_of
from fpo_mlx.train.scoring import FACTS, Scorer

SIDES = ("chosen", "rejected")
RESAMPLES = 1000
DRAWN = 1_000_000  # numbers of pairs in memory at once, however many pairs there are
# means over pairs that get an interval, where they were measured
WITH_INTERVAL = (
    "rewards/accuracies", "rewards/margins", "policy_accuracy", "logps_per_token/chosen_change",
    "features/chosen", "features/rejected", "features/margin",
    "drift/chosen", "drift/rejected",
    "kl/chosen", "kl/rejected", "kl/margin",
)  # fmt: skip
SHARES = ("rewards/accuracies", "policy_accuracy")  # of pairs: each is right or is not
PER_SIDE = (("feature_mse", "features"), ("kl", "kl"), ("log_collision", "log_collisions"))
STRATA = ("short", "middle", "long")
BY_LENGTH = ("rewards/accuracies", "policy_accuracy", "rewards/margins")


@dataclass(frozen=True)
class EvalReport:
    """summary: means over pairs, with 95 % intervals; pairs: one record per pair."""

    summary: Mapping[str, Any]
    pairs: Sequence[Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]] = ()  # sampled, as `sampling.records` gives them
    adapter_scale: float = 1.0  # part of the adapter's change that was taken
    trained_on: bool = False  # these very pairs, by its run.json
    adapter_sha256: str | None = None  # of the adapter's weights; None of the base

    def as_dict(self) -> dict[str, Any]:
        own = {"adapter_sha256": self.adapter_sha256} if self.adapter_sha256 else {}
        out = {**own, "summary": dict(self.summary), "pairs": list(self.pairs)}
        if self.adapter_scale != 1.0:
            out["adapter_scale"] = self.adapter_scale
        out |= {"trained_on": True} if self.trained_on else {}
        return out | ({"answers": list(self.answers)} if self.answers else {})

    def with_answers(
        self, answers: Sequence[Answer], shown: Sequence[Mapping[str, Any]]
    ) -> EvalReport:
        """The same, with what sampled answers say of the model. shown: their records."""
        return replace(
            self, summary={**self.summary, **answer_summary(answers)}, answers=list(shown)
        )


@dataclass(frozen=True)
class EvalTable:
    """Adapters beside the reference, on the same pairs. base: None when it alone was judged."""

    adapters: Mapping[str, EvalReport]  # by the name that the user gave; path*0.25 for a part
    base: EvalReport | None = None
    objective: Mapping[str, Any] = field(default_factory=dict)  # settings that made the losses
    split: str | None = None  # of the data that was judged on

    @property
    def columns(self) -> dict[str, EvalReport]:
        if self.base is None:
            return dict(self.adapters)
        return {BASE: self.base} | {shown_name(path): r for path, r in self.adapters.items()}

    def as_dict(self) -> dict[str, Any]:
        """One adapter: its path, summary and pairs, and the base; several: a list of them."""
        base = {"objective": dict(self.objective)} if self.objective else {}
        base |= {"split": self.split} if self.split else {}
        base |= {BASE: self.base.as_dict()} if self.base else {}
        if len(self.adapters) == 1:
            ((path, report),) = self.adapters.items()
            adapter = _path(path, report) if self.base else None
            own = {"adapter_path": adapter} | report.as_dict() | base
            return result_file("evaluate", own)
        named = [{"adapter_path": _path(n, r), **r.as_dict()} for n, r in self.adapters.items()]
        return result_file("evaluate", base | {"adapters": named})

    def by_path(self) -> dict[str, list[EvalReport]]:
        """All parts that were judged of each adapter."""
        found: dict[str, list[EvalReport]] = {}
        for name, report in self.adapters.items():
            found.setdefault(_path(name, report), []).append(report)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a model, intervals in two columns: for a CSV."""
        return [{"model": name} | _flat(r.summary) for name, r in self.columns.items()]


def name_of(path: str, scale: float) -> str:
    """How an adapter is called of which a part is taken: adapters*0.25."""
    return path if scale == 1.0 else f"{path}*{scale:g}"


def _path(name: str, report: EvalReport) -> str:
    """The adapter's folder of a column's name."""
    return name.removesuffix(name_of("", report.adapter_scale))


def evaluate(scorer: Scorer, data: ScoredPairs, size: int = 1) -> EvalReport:
    """Score every pair without gradient. Log-probs are sums in nats, lengths in tokens."""
    values = measure(scorer, data, size)
    records = [_record(i, data, values) for i in range(len(data))]
    return EvalReport(summarise(values, data), records)


def reference_report(data: ScoredPairs, like: Mapping[str, Any]) -> EvalReport:
    """The reference judged by its own cached scores: no forward pass.

    like: the summary of an adapter; features and KL are 0 where that one has them.
    """
    logps = np.array([[side.logps for side in ref] for ref in data.refs]).T  # [2, B]
    tokens = _lengths(data)
    per_token, zeros = logps / tokens, np.zeros(len(data))
    nothing = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    nothing += ("logps_per_token/chosen_change", "logps_per_token/rejected_change")
    nothing += tuple(f"{n}/{s}" for n in ("features", "drift", "kl") for s in (*SIDES, "margin"))
    values = {name: zeros for name in nothing if name in like}
    values["policy_accuracy"] = (per_token[0] > per_token[1]).astype(np.float64)
    for side, name in enumerate(SIDES):
        values[f"logps/{name}"] = logps[side]
        values[f"logps_per_token/{name}"] = per_token[side]
    summary = summarise(values, data)
    summary.pop("rewards/accuracies/ci95", None)  # 0 by definition, of any number of pairs
    return EvalReport(summary, [])


def summarise(values: Mapping[str, np.ndarray], data: ScoredPairs) -> dict[str, Any]:
    """Means over pairs, intervals, lengths, perplexity. values: per metric [B].

    Intervals are over prompts: pairs of one prompt are no independent witnesses.
    """
    tokens, prompts = _lengths(data), np.array(prompts_of(data.pairs))
    asked = int(prompts.max()) + 1
    summary: dict[str, Any] = {"n": len(data)} | ({"prompts": asked} if asked < len(data) else {})
    means = {name: float(array.mean()) for name, array in values.items()}
    summary |= {k: v for k, v in means.items() if v != FACTS.get(k)}  # facts that rows do not have
    drawn = asked > 1 or len(data) == 1  # one prompt that is drawn again is always itself
    for name in WITH_INTERVAL:
        if name in values and name in SHARES:
            # resampled pairs that are all right would say that every pair is
            summary[f"{name}/ci95"] = _of_share(values[name], prompts)
        elif name in values and drawn:
            summary[f"{name}/ci95"] = bootstrap_interval(values[name], groups=prompts)
    logps = -values["logps/chosen"] / tokens[0]
    summary["perplexity/chosen"] = float(np.exp(np.average(logps, weights=tokens[0])))
    if drawn:
        low, high = bootstrap_interval(logps, weights=tokens[0], groups=prompts)
        summary["perplexity/chosen/ci95"] = (float(np.exp(low)), float(np.exp(high)))
    return summary | _by_length(values, tokens)


def answer_summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Diversity of sampled answers. Entropy: nats a token, over all tokens of all answers."""
    lengths = np.array([len(answer.tokens) for answer in answers])
    means = np.array([answer.entropies.mean() for answer in answers])
    out: dict[str, Any] = {
        "answers/n": len(answers),
        "answers/tokens": float(lengths.mean()),
        "answers/finished": float(np.mean([answer.finished for answer in answers])),
        "answers/entropy": float(np.average(means, weights=lengths)),
        "answers/entropy/ci95": bootstrap_interval(means, weights=lengths),
    }
    for n in (1, 2, 3):
        out[f"answers/distinct_{n}"] = distinct_n([answer.tokens for answer in answers], n)
    return out


def _lengths(data: ScoredPairs) -> np.ndarray:
    return np.array([[len(y) for y in pair.responses] for pair in data.pairs]).T  # [2, B]


def _of_share(hits: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of the share of right pairs, by how alike those of a prompt are."""
    return wilson(float(hits.mean()), witnesses(hits.tolist(), prompts.tolist()))


def _record(i: int, data: ScoredPairs, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    pair = data.pairs[i]
    record: dict[str, Any] = {"index": pair.index}
    for side, response, ref in zip(SIDES, pair.responses, data.refs[i], strict=True):
        record[side] = {
            "tokens": len(response),
            "logp": float(values[f"logps/{side}"][i]),
            "ref_logp": float(ref.logps),
        }
        for name, key in PER_SIDE:
            if f"{key}/{side}" in values:
                record[side][name] = float(values[f"{key}/{side}"][i])
    for name, usual in FACTS.items():
        if values[name][i] != usual:
            record[name] = float(values[name][i])
    return record | {"loss": float(values["loss"][i]), "u": float(values["u"][i])}


def _by_length(values: Mapping[str, np.ndarray], tokens: np.ndarray) -> dict[str, Any]:
    """Accuracy where the chosen response is longer, and where it is not; and by its length.

    Three strata of about equal size by the chosen response's tokens; None where one is empty.
    """
    longer = tokens[0] > tokens[1]
    groups = {"chosen_longer": longer, "chosen_not_longer": ~longer}
    edges = np.quantile(tokens[0], [1 / 3, 2 / 3])
    stratum = np.searchsorted(edges, tokens[0])  # equal lengths fall into the same one
    groups |= {name: stratum == i for i, name in enumerate(STRATA)}
    out: dict[str, Any] = {"share_chosen_longer": float(longer.mean())}
    for name, group in groups.items():
        if name in STRATA:
            out[f"tokens/{name}"] = _range(tokens[0][group])
            out[f"n/{name}"] = int(group.sum())
        for metric in BY_LENGTH:
            mean = float(values[metric][group].mean()) if group.any() else None
            out[f"{metric}/{name}"] = mean
    return out


def _range(lengths: np.ndarray) -> tuple[int, int] | None:
    return (int(lengths.min()), int(lengths.max())) if len(lengths) else None


def bootstrap_interval(
    values: np.ndarray,
    seed: int = 0,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of the (weighted) mean over resampled pairs. values: [B].

    groups: the number of each pair's group, from 0; groups are drawn whole.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    totals = values * weights
    if groups is not None:
        totals, weights = np.bincount(groups, totals), np.bincount(groups, weights)
    rng, n, means = np.random.default_rng(seed), len(totals), []
    at_once = max(1, DRAWN // n)
    for start in range(0, RESAMPLES, at_once):
        picks = rng.integers(0, n, size=(min(at_once, RESAMPLES - start), n))
        means.append(totals[picks].sum(axis=1) / weights[picks].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, tuple | list):
            flat |= {f"{name}/low": value[0], f"{name}/high": value[1]}
        else:
            flat[name] = value
    return flat
