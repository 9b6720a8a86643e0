"""Feature control on SmolLM2: the pairs prefer lists; are lists held back, and is the rest learned?

    python scripts/studies/control.py [--seeds 3] [--iters 150] [--answers 60] [--work DIR]

The chosen answers of the pairs have bullet or numbered lists far more often than the rejected ones,
and are better in other ways too. Four models are compared: the base, FPO without control, FPO with
the features of lists (found by `features find` on the training answers) held by --feature-weights,
and FPO with as many others held, which are as active and do not tell lists from prose: holding any
feature slows all learning, so only what the list features do beyond these is control. Of each: the
share of sampled answers with a list, with a 95 % interval, and the reward accuracy on held-out
pairs. Each finished step is kept in --work, so that a killed run goes on where it was; the result
is scripts/studies/results/control.json. Some two hours on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import intervals
import numpy as np
from find_features import text_sets
from texts import ROOT, begin, gains, is_list, rows, say, study_parser, write_rows

from fpo_mlx import machine, pipeline
from fpo_mlx.config import Sampling, load_config
from fpo_mlx.data.feature_files import write_weights
from fpo_mlx.judge.feature_report import auc
from fpo_mlx.storage import files

RESULT = ROOT / "scripts" / "studies" / "results" / "control.json"
KINDS = ("free", "held", "others")
UNRELATED = 0.1  # from 1/2: the AUC of a feature that does not tell lists from prose
MEASURED = (
    "rewards/margins", "logps_per_token/chosen_change", "features/chosen", "features/rejected",
)  # fmt: skip
POINTS = 0.05  # what may be lost: 5 points


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "control-work")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--iters", type=int, default=150, help="updates of one pair")
    parser.add_argument("--train-pairs", type=int, default=150, help="the first of the file")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--answers", type=int, default=60, help="sampled for each model and seed")
    parser.add_argument("--tokens", type=int, default=160, help="of a sampled answer at most")
    parser.add_argument("--pairs", type=int, default=100, help="held-out pairs to judge on")
    parser.add_argument("--texts", type=int, default=60, help="of each kind, to find features")
    parser.add_argument("--features", type=int, default=10, help="to hold")
    parser.add_argument("--weight", type=float, default=100.0)
    parser.add_argument("--max-seq-length", type=int, default=320)
    return parser.parse_args()


def main() -> None:
    machine.set_up()
    o = parse()
    model, steps = begin(o)
    data = split(o)
    base = {
        "model": model, "sae": (str(o.sae),), "data": str(data),
        "max_seq_length": o.max_seq_length, "reference": str(o.work / "reference"),
    }  # fmt: skip
    weights = {"held": o.work / "weights.csv", "others": o.work / "others.csv"}
    found = steps("features", lambda: find(o, base, weights["held"]))
    others = steps("others", lambda: find_others(o, base, found, weights["others"]))
    runs: list[dict[str, Any]] = []
    for seed in range(o.seeds):
        sampled = steps(f"answers-base-{seed}", lambda s=seed: answers(o, base, None, s))
        runs.append({"kind": "base", "seed": seed, **sampled})
        for kind in KINDS:
            own = {**base, "feature_weights": str(weights[kind])} if kind in weights else base
            folder = o.work / f"{kind}-{seed}"
            steps(f"train-{kind}-{seed}", lambda c=own, f=folder, s=seed: train(o, c, f, s))
            judged = steps(f"judge-{kind}-{seed}", lambda f=folder: judge(o, base, f))
            sampled = steps(
                f"answers-{kind}-{seed}", lambda f=folder, s=seed: answers(o, base, f, s)
            )
            runs.append({"kind": kind, "seed": seed, **judged, **sampled})
    said = {
        k: v.name if isinstance(v, Path) else v for k, v in vars(o).items() if k in steps.settings
    }
    said |= {"model": Path(model).name, "seeds": o.seeds}
    result = {"settings": said, "features": found, "others": others, "runs": runs}
    result["verdict"] = verdict(runs)
    files.write_json(o.output, result)
    print(json.dumps(result["verdict"], indent=2))


def split(o: argparse.Namespace) -> Path:
    """The pairs that this uses, in the work folder: the first of both files."""
    folder = o.work / "data"
    write_rows(folder / "train.jsonl", rows(o.data / "train.jsonl")[: o.train_pairs])
    write_rows(folder / "valid.jsonl", rows(o.data / "valid.jsonl")[: o.pairs])
    return folder


def find(o: argparse.Namespace, base: dict[str, Any], weights: Path) -> list[dict[str, Any]]:
    """The features of lists, under the base model, from training answers only."""
    positive, negative = text_sets(o.data / "train.jsonl", o.work, o.texts)
    found = pipeline.find_features(
        load_config(base), positive=positive, negative=negative, limit=o.texts, top=o.features,
        say=say,
    )  # fmt: skip
    kept = [{"feature": one.feature, "weight": o.weight} for one in found]
    write_weights(weights, kept)
    return [
        {**row, "auc": one.auc, "held_out_auc": one.held_out_auc}
        for row, one in zip(kept, found, strict=True)
    ]


def find_others(
    o: argparse.Namespace, base: dict[str, Any], found: list[dict[str, Any]], weights: Path
) -> list[dict[str, Any]]:
    """Features to compare with: each as active as one that was found, and none of lists."""
    texts = text_sets(o.data / "train.jsonl", o.work, o.texts)
    seen = pipeline.text_activations(load_config(base), texts, limit=o.texts, say=say)
    pairs = twins([one["feature"] for one in found], seen[0].mean, seen[1].mean)
    write_weights(weights, [{"feature": one["feature"], "weight": o.weight} for one in pairs])
    return pairs


def twins(
    features: list[int],
    lists: np.ndarray,
    prose: np.ndarray,
    *,
    along: tuple[np.ndarray, float] | None = None,
    taken: Collection[int] = (),
) -> list[dict[str, Any]]:
    """For each feature the one nearest in mean activation of those with AUC about 1/2.

    lists, prose: mean activation of every feature in each text, [N, F] and [M, F].
    along: a figure of every feature, [F], and how far a feature and its twin may lie apart in it.
    taken: those that are no twins.
    """
    activity = np.concatenate([lists, prose]).mean(axis=0)
    aucs = {int(i): auc(lists[:, i], prose[:, i]) for i in np.flatnonzero(activity > 0)}
    free = {i: activity[i] for i, a in aucs.items() if abs(a - 0.5) < UNRELATED}
    free = {i: size for i, size in free.items() if i not in features and i not in taken}
    if len(free) < len(features):
        raise SystemExit(
            f"{len(free)} features tell nothing of the behaviour, wanted {len(features)}."
        )
    out = []
    for feature in features:
        near = free
        if along:
            figure, most = along
            near = [i for i in free if abs(figure[i] - figure[feature]) <= most]
            if not near:
                raise SystemExit(f"no feature lies as near to the mean stream as {feature} does.")
        other = min(near, key=lambda i: abs(np.log(free[i] / activity[feature])))
        del free[other]
        out.append({"feature": other, "auc": aucs[other], "activation": float(activity[other])})
        out[-1] |= {"in_place_of": feature, "its_activation": float(activity[feature])}
    return out


def train(o: argparse.Namespace, base: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    config = load_config(
        base
        | {"adapter_path": str(folder), "seed": seed, "iters": o.iters, "batch_size": 1}
        | {"learning_rate": o.learning_rate, "steps_per_eval": 10**6, "val_batches": 1}
        | {"max_margin": 1e3}  # |u| / beta has D in it, and a weight of 100 makes that large
    )
    last: Any = None
    for report in pipeline.train(config, say=say):
        last = getattr(report, "loss", last)
    return {"loss": last}


def judge(o: argparse.Namespace, base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """On held-out pairs, with the plain D whatever was held in training."""
    del o
    report = pipeline.evaluate(
        load_config(base), adapter_path=str(folder), split="valid", measure_kl=False, say=say
    )
    return {name: report.summary[name] for name in ("rewards/accuracies", *MEASURED)} | {
        "right": [chosen > rejected for chosen, rejected in map(gains, report.pairs)]
    }


def answers(
    o: argparse.Namespace, base: dict[str, Any], folder: Path | None, seed: int
) -> dict[str, Any]:
    """Which of the sampled answers to held-out prompts have a list; equal noise for all kinds."""
    import mlx.core as mx

    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.judge.sampling import sample
    from fpo_mlx.model import adapters
    from fpo_mlx.model.load import load_model

    model, tokenizer = load_model(base["model"]).model, load_tokenizer(Path(base["model"]))
    if folder is not None:
        adapters.load(model, folder)
    model.eval()
    prompts = [row["prompt"] for row in rows(Path(base["data"]) / "valid.jsonl")][: o.answers]
    tokens = [
        np.array(tokenizer.prompt_tokens([{"role": "user", "content": p}]), dtype=np.int32)
        for p in prompts
    ]
    settings = Sampling(o.tokens, 1.0, seed)
    texts = [
        tokenizer.decode(answer.tokens.tolist(), skip_special=True)
        for answer in sample(model, tokens, settings, tokenizer.eos_token_ids)
    ]
    mx.clear_cache()
    return {"lists": [is_list(text) for text in texts], "example": texts[0]}


def verdict(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates over all seeds with both 95 % intervals."""
    out: dict[str, Any] = {}
    for key in MEASURED:
        for kind in KINDS:
            values = [run[key] for run in runs if run["kind"] == kind]
            out[f"{key}/{kind}"] = {"mean": float(np.mean(values)), "seeds": values}
    lists = {kind: _matrix(runs, kind, "lists") for kind in ("base", *KINDS)}
    right = {kind: _matrix(runs, kind, "right") for kind in KINDS}
    for kind, matrix in lists.items():
        out[f"lists/{kind}"] = {"rate": float(matrix.mean()), **_interval(matrix)}
    for kind, matrix in right.items():
        out[f"accuracy/{kind}"] = {"rate": float(matrix.mean()), **_interval(matrix)}
    for name, values in (
        ("lists/free - base", lists["free"] - lists["base"]),
        ("lists/held - base", lists["held"] - lists["base"]),
        ("lists/others - base", lists["others"] - lists["base"]),
        ("lists/held - free", lists["held"] - lists["free"]),
        ("lists/others - free", lists["others"] - lists["free"]),
        ("lists/held - others", lists["held"] - lists["others"]),
        ("accuracy/held - free", right["held"] - right["free"]),
        ("accuracy/others - free", right["others"] - right["free"]),
        ("accuracy/held - others", right["held"] - right["others"]),
    ):
        out[name] = {"points": 100 * float(values.mean()), **_interval(100 * values)}
    # without this there was nothing to hold back, and the rest says nothing
    out["lists were learned without control"] = out["lists/free - base"]["ci95"][0] > 0
    out["within 5 points"] = {
        "lists": abs(out["lists/held - base"]["points"]) <= 100 * POINTS,
        "accuracy": abs(out["accuracy/held - free"]["points"]) <= 100 * POINTS,
    }
    return out


def _matrix(runs: list[dict[str, Any]], kind: str, key: str) -> np.ndarray:
    """[seeds, prompts or pairs]."""
    return np.array([run[key] for run in runs if run["kind"] == kind], dtype=np.float64)


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Of the mean over seeds and prompts, and over seeds alone. values: [seeds, n]."""
    found = intervals.gap(values, 0 * values)
    return {"ci95": found["drawn"], "t": found.get("t")}


if __name__ == "__main__":
    main()
