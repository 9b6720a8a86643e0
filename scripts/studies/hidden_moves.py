"""Does a mean over tokens hide what features do? Pooled and token-wise drift of adapters in part.

    python scripts/studies/hidden_moves.py --model M --sae S --data DIR \\
        --adapter dpo=ADAPTER --adapter held=ADAPTER [--parts 0.25 0.5 1] [--pairs 40]

FPO's D compares means over a response, so a feature that rises on one token and falls on the next
has not moved. Were that a way around the constraint, features of a run that was held would move
more, token by token, than those of a run that nothing held and whose means moved as far. `seen` is
the share of the squared moves that is left in the means: the sum over features of (mean move)^2,
over that of mean (move^2). It is 1 where every token moves alike, and one over the number of tokens
where each moves for itself. Adapters are compared at equal drift of the rejected answers (DRIFTS),
between their parts. PATH: an adapter folder; after a target it holds a part of the run's change.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from texts import say

from fpo_mlx import machine
from fpo_mlx.config import load_config
from fpo_mlx.storage import files

SIDES = ("chosen", "rejected")
DRIFTS = (0.05, 0.1, 0.2)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="pairs")
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--parts", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--max-seq-length", type=int, default=224)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    names = dict(one.split("=", 1) for one in o.adapter)
    found = list(measured(o, names))
    at = {name: at_drifts([one for one in found if one["adapter"] == name]) for name in names}
    print(json.dumps({"points": found, "at": at}, indent=2), flush=True)
    if o.output:
        files.write_json(o.output, {"points": found, "at": at})


def measured(o: argparse.Namespace, adapters: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Of each part of each adapter; a response runs through the base once for all of them."""
    from fpo_mlx.judge.feature_scan import encoded
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.pipeline.evaluate import open_scorer
    from fpo_mlx.pipeline.features import tapped_policy
    from fpo_mlx.pipeline.job import open_job, read_pairs

    settings = {
        "model": str(o.model), "sae": (str(o.sae),), "data": str(o.data),
        "max_seq_length": o.max_seq_length,
    }  # fmt: skip
    job = open_job(load_config(settings), say=say)
    pairs = read_pairs(job, o.split, say)[: o.pairs]
    encoder = encoder_of(job.saes[0])
    answers = [
        (side, pair.prompt, response)
        for pair in pairs
        for side, response in zip(SIDES, pair.responses, strict=True)
    ]
    base = tapped_policy(job, None, say)
    before = [encoded(encoder, base.answer_rows(*texts).tapped[0]) for _, *texts in answers]
    for (name, path), part in itertools.product(adapters.items(), o.parts):
        policy = open_scorer(job, path, scale=part, measure_kl=False, say=say).policy
        found: dict[str, list[Moves]] = {side: [] for side in SIDES}
        for (side, *texts), at_first in zip(answers, before, strict=True):
            after = encoded(encoder, policy.answer_rows(*texts).tapped[0])
            found[side].append(moves(at_first, after, o.top_k))
        yield {"adapter": name, "part": part, **{side: summary(found[side]) for side in SIDES}}


Moves = dict[str, float]


def moves(before: np.ndarray, after: np.ndarray, k: int) -> Moves:
    """Squared moves of the features that D looks at, and the reference's squares.

    before, after: activations of one response, [n, F]. The features: the k largest means of either
    (FPO, Eq. 9); the squares of the reference: of its own k.
    """
    change, at_first = after - before, before.mean(axis=0)
    own, its = (top(mean, k) for mean in (at_first, after.mean(axis=0)))
    looked_at = np.union1d(own, its)
    return {
        "of_means": float((change.mean(axis=0)[looked_at] ** 2).sum()),
        "of_tokens": float((change[:, looked_at] ** 2).mean(axis=0).sum()),
        "means": float((at_first[own] ** 2).sum()),
        "tokens": float((before[:, own] ** 2).mean(axis=0).sum()),
    }


def top(means: np.ndarray, k: int) -> np.ndarray:
    """The k largest of [F], and of those none that is silent."""
    order = np.argsort(-means, kind="stable")[:k]
    return order[means[order] > 0]


def at_drifts(points: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Of the rejected answers, between parts by straight lines; without drifts out of reach."""
    line = sorted((point["rejected"] for point in points), key=lambda one: one["drift"])
    drifts = [one["drift"] for one in line]
    return [
        {"drift": level} | {
            name: float(np.interp(level, drifts, [one[name] for one in line]))
            for name in ("token_drift", "seen")
        }
        for level in DRIFTS
        if drifts[0] <= level <= drifts[-1]
    ]  # fmt: skip


def summary(responses: Sequence[Moves]) -> dict[str, float]:
    """Drift as the tool has it, the same token by token, and the share that the means see."""
    of = {name: np.array([one[name] for one in responses]) for name in responses[0]}
    return {
        "drift": float(np.sqrt((of["of_means"] / of["means"]).mean())),
        "token_drift": float(np.sqrt((of["of_tokens"] / of["tokens"]).mean())),
        "seen": float(of["of_means"].sum() / of["of_tokens"].sum()),
    }


if __name__ == "__main__":
    main()
