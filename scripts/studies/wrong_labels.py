"""Labels planted wrong in real pairs: are they found, and does training gain without them?

    python scripts/studies/wrong_labels.py --reference REF [--share 0.1] [--seeds 3] [--train]

A share of the pairs gets chosen and rejected exchanged; `features data` orders the rows by how
unlikely their label is. The figure is the area under the ROC curve of finding the exchanged ones,
for the features and for what they stand beside. With --train FPO runs on the pairs as they are
spoiled, on what is left after as many rows as were planted are dropped from the unlikely end, and
on as many fewer rows drawn by chance; each is judged on held-out pairs. Scores are kept per
response, so the spoiled pairs are in the same reference cache. Finished steps are kept in --work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from texts import ROOT, begin, goes_on, rows, say, study_parser, write_rows

from fpo_mlx import machine, pipeline
from fpo_mlx.config import load_config
from fpo_mlx.judge.feature_report import auc
from fpo_mlx.judge.lessons import PairFeatures, pair_features
from fpo_mlx.judge.logistic import SparseRows, held_out_logits, sigmoid
from fpo_mlx.storage import files

RESULTS = ROOT / "scripts" / "studies" / "results"


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "wrong-labels-work")
    parser.add_argument("--reference", type=Path, help="cache of precompute; filled where it lacks")
    parser.add_argument(
        "--output", type=Path, help="result; default: results/wrong_labels_SAE.json"
    )
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--iters", type=int, default=300, help="updates of one pair")
    parser.add_argument("--max-seq-length", type=int, default=1024)
    return parser.parse_args()


def main() -> None:
    machine.set_up()
    o = parse()
    kept = {
        "sae": o.sae.name, "iters": o.iters, "max_seq_length": o.max_seq_length, "train": o.train
    }  # fmt: skip
    place = place_of(o, kept)  # before the long part
    model, steps = begin(o)
    base = {
        "model": model, "sae": (str(o.sae),), "data": str(o.data),
        "max_seq_length": o.max_seq_length, "reference": str(o.reference or o.work / "reference"),
    }  # fmt: skip
    result: dict[str, Any] = {"share": o.share, "settings": kept, "seeds": []}
    for seed in range(o.seeds):
        found = steps(f"find-{seed}", lambda s=seed: find(base, o.share, s))
        one = {"seed": seed, "pairs": found["pairs"], "auc": found["auc"]}
        for kind in ("spoiled", "dropped", "fewer") if o.train else ():
            one[kind] = steps(
                f"{kind}-{seed}", lambda k=kind, f=found, s=seed: train(o, base, k, f, s)
            )
        result["seeds"].append(one)
    result["auc"] = {
        name: float(np.mean([one["auc"][name] for one in result["seeds"]]))
        for name in result["seeds"][0]["auc"]
    }
    files.write_json(place, result)
    print(json.dumps(result, indent=2))


def place_of(o: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Where the result goes.

    Raises: SystemExit where one of other settings, or of more seeds, is kept there.
    """
    place = o.output or RESULTS / f"wrong_labels_{o.sae.name}.json"
    own = {"share": o.share, "settings": settings}
    known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else own
    found = {name: known.get(name) for name in own}
    if found != own:
        raise SystemExit(
            f"{place} is the result of other settings: {found}, wanted {own}. "
            "Name another file with --output."
        )
    if (more := len(known.get("seeds", ()))) > o.seeds:
        raise SystemExit(
            f"{place} has {more} seeds, and these are {o.seeds}. Name another file with --output."
        )
    return place


def find(base: dict[str, Any], share: float, seed: int) -> dict[str, Any]:
    """Which rows were exchanged, how unlikely each label is, and how well that finds them."""
    job = pipeline.open_job(load_config(base), say=say, need_sae=True)
    pairs = pipeline.read_pairs(job, "train", say)
    refs = pipeline.CachedScores(pipeline.reference_of(job, pairs, say), pairs)
    x = pair_features(pairs, refs, [sae.n_features for sae in job.saes])
    wrong = np.random.default_rng(seed).random(len(pairs)) < share
    x = exchanged(x, wrong)
    length = SparseRows.of_dense(x.length_columns)
    kinds = {"features": x.difference, "length": length, "bag of words": x.words}
    unlikely = {name: 1 - sigmoid(held_out_logits(rows, x.groups)) for name, rows in kinds.items()}
    return {
        "pairs": len(pairs),
        "rows": [pair.index for pair in pairs],
        "wrong": wrong.tolist(),
        "unlikely": unlikely["features"].tolist(),
        "auc": {name: auc(u[wrong], u[~wrong]) for name, u in unlikely.items()},
    }


def exchanged(x: PairFeatures, wrong: np.ndarray) -> PairFeatures:
    """Chosen and rejected changed places in the rows that are marked. wrong: bool [N]."""
    n = len(x)
    order = np.where(wrong, np.arange(n) + n, np.arange(n))
    back = np.where(wrong, np.arange(n), np.arange(n) + n)
    both = stacked(x.chosen, x.rejected)
    signs = np.where(wrong, -1.0, 1.0)
    words = SparseRows(
        x.words.offsets, x.words.columns, x.words.values * signs[x.words.owner], x.words.width
    )
    lengths = np.where(wrong[:, None], x.lengths[:, ::-1], x.lengths)
    return PairFeatures(both.take(order), both.take(back), x.sizes, lengths, words, x.groups)


def stacked(a: SparseRows, b: SparseRows) -> SparseRows:
    """The rows of a, then those of b."""
    offsets = np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]])
    columns = np.concatenate([a.columns, b.columns])
    return SparseRows(offsets, columns, np.concatenate([a.values, b.values]), a.width)


def train(
    o: argparse.Namespace, base: dict[str, Any], kind: str, found: dict[str, Any], seed: int
) -> dict[str, Any]:
    """FPO on the spoiled rows, all or some of them; judged on the held-out pairs as they are."""
    wrong, n = np.array(found["wrong"]), len(found["wrong"])
    gone: set[int] = set()
    if kind == "dropped":
        gone = set(np.argsort(-np.array(found["unlikely"]))[: int(wrong.sum())].tolist())
    elif kind == "fewer":
        drawn = np.random.default_rng(seed + 1000).permutation(n)
        gone = set(drawn[: int(wrong.sum())].tolist())
    given, kept = rows(o.data / "train.jsonl"), []
    for i, number in enumerate(found["rows"]):
        row = dict(given[number])
        if wrong[i]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        if i not in gone:
            kept.append(row)
    folder, out = o.work / f"data-{kind}-{seed}", o.work / f"{kind}-{seed}"
    write_rows(folder / "train.jsonl", kept)
    own = base | {"data": str(folder), "adapter_path": str(out), "seed": seed, "iters": o.iters}
    own |= {"batch_size": 1, "learning_rate": 2e-5, **goes_on(out)}
    for _ in pipeline.train(load_config(own), say=say):
        pass
    report = pipeline.evaluate(
        load_config(base), adapter_path=str(out), split="valid", measure_kl=False, say=say
    )
    names = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
    left = int(sum(w for i, w in enumerate(wrong) if i not in gone))
    return {"rows": len(kept), "wrong": left} | {name: report.summary[name] for name in names}


if __name__ == "__main__":
    main()
