"""Which block and site should FPO's SAE read? One SAE at each place, FPO with each, beside DPO.

    python scripts/studies/blocks.py [--blocks 9 18 27] [--sites resid_post mlp_out] [--seeds 3]
    python scripts/studies/blocks.py … --seed 1     this one only: a core for each seed, with a copy
        of --work that has the SAEs
    python scripts/studies/blocks.py … --vary resid_post-27 [--variants free chosen …]
        other distances at one place, beside it

The paper's tables 3 and 7 in small. At each place an SAE is trained with the same width, k and
tokens. FPO then runs on the same short pairs with each, held to the same drift of its features, and
DPO without a constraint; of every run parts of its change (PARTS) are judged on pairs apart. A
drift of one place is not that of another, so runs are compared at equal KL, between their parts:
the margin in nats per token, and its difference from DPO's, with 95 % by bootstrap over seeds and
pairs. Adapters are where the tool puts them, at the SAE's block and below, so places differ in what
may move as well; `--all-blocks` adapts every block for all of them. With `--vary` a place has other
distances beside FPO's own (VARIANTS): none, with gradient through the chosen response, of fewer or
more features, of all features (named ones, which hold the chosen response, too), alike or by what
each adds to the logits, of a second SAE (`--second`); each is compared with the place itself. SAEs
and adapters are kept in --work, what was measured in results/blocks/: a stopped study goes on, and
what was measured is not measured again on another machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import frontier_show
import intervals
import numpy as np
from texts import ROOT, Steps, as_adapter, gains, goes_on, say, settings_of, shared, short_pairs

from fpo_mlx import machine, pipeline
from fpo_mlx.config import RunConfig, SaeTrainConfig, load_config
from fpo_mlx.data.feature_files import write_weights
from fpo_mlx.demo import smollm2
from fpo_mlx.errors import Diverged
from fpo_mlx.records import SaeWeights
from fpo_mlx.storage import files

PARTS = (0.25, 0.5, 1.0)
LEVELS = (1.0, 3.0, 10.0)  # nats per held-out answer, mean of chosen and rejected
ALIKE = 0.005  # FVU: what an SAE may differ by that is trained anew
RIVAL, MARGIN, KL = "dpo", "margin/of_pairs", "kl"
VARIANTS: dict[str, dict[str, Any]] = {  # settings of FPO that differ
    "free": {"target_drift": None, "alpha": 0.0},
    "chosen": {"stop_gradient": False},
    "k10": {"top_k": 10},
    "k250": {"top_k": 250},
    "all": {},
    "logits": {},
}
ADDING = ("blocks", "sites", "vary", "variants", "second")  # cells to what is there


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=shared("data"), help="pairs: train, valid")
    parser.add_argument("--texts", type=Path, default=shared("data") / "chats.jsonl")
    parser.add_argument("--blocks", type=int, nargs="+", default=[9, 18, 27])
    parser.add_argument("--sites", nargs="+", default=["resid_post", "mlp_out"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each SAE's training")
    parser.add_argument("--sae-batch-size", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=60, help="held-out pairs to judge on")
    parser.add_argument("--iters", type=int, default=160, help="updates of one pair")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--target-drift", type=float, default=0.3)
    parser.add_argument("--max-seq-length", type=int, default=224)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--vary", metavar="PLACE", help="SITE-BLOCK, alone with its VARIANTS")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--second", metavar="PLACE", help="a variant with this one's SAE, too")
    parser.add_argument("--all-blocks", action="store_true", help="adapt every block for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, action="append", default=[], help="these, not all")
    parser.add_argument("--work", type=Path, default=ROOT / "blocks-work")
    parser.add_argument("--output", type=Path, help="folder of what is measured")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    o.model = o.model or smollm2.fetch(say=say).full
    settings = settings_of(o, *ADDING)
    anywhere = settings | {k: getattr(o, k).name for k in ("model", "data", "texts")}
    anywhere["parts"] = str(PARTS)
    place = o.output or ROOT / "scripts" / "studies" / "results" / "blocks"
    made, measured = Steps(o.work, settings), Steps(place, anywhere)
    short_pairs(o.data, o.work / "data", {"test": o.pairs})
    places = [f"{site}-{block}" for block in o.blocks for site in o.sites]
    if o.vary:
        variants = [*o.variants, *([o.second] if o.second else [])]
        places = [o.vary, *(f"{o.vary}+{variant}" for variant in variants)]
    for seed in o.seed or range(o.seeds):
        for kind in (RIVAL, *places):
            if not measured.done(f"{kind}-{seed}"):
                for own in saes_of(kind):
                    figures = made(f"sae-{own}", partial(train_sae, o, own))
                    need_alike(own, measured(f"sae-{own}", lambda f=figures: f), figures)
            measured(f"{kind}-{seed}", partial(cell, o, kind, seed))
            write(place, measured.values())


def write(place: Path, steps: Mapping[str, Any]) -> None:
    """The comparison, from all that is there."""
    runs = [found for found in steps.values() if found.get("points")]
    saes = {n.removeprefix("sae-"): v for n, v in steps.items() if n.startswith("sae-")}
    ended = [name for name, found in steps.items() if "diverged" in found]
    result = {"saes": saes, "at equal KL": table(runs), "diverged": ended}
    files.write_json(place / "compared.json", result)
    print(json.dumps(result["at equal KL"], indent=2), flush=True)


def train_sae(o: argparse.Namespace, place: str) -> dict[str, Any]:
    site, block = place.rsplit("-", 1)
    folder = o.work / f"sae-{place}"
    done = pipeline.sae_train(
        SaeTrainConfig(
            model=str(o.model), data=str(o.texts), output=str(folder), layer=int(block), site=site,
            width=o.width, k=o.k, training_tokens=o.tokens, batch_size=o.sae_batch_size,
            passes=1000.0, save_every=20, **goes_on(folder, "checkpoint.safetensors"),
        ),
        say=say,
    )  # fmt: skip
    figures = {} if done.figures is None else {"fvu": done.figures.fvu, "dead": done.figures.dead}
    return figures | {"loss_recovered": None if done.loss is None else done.loss.recovered}


def need_alike(place: str, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """An SAE that was lost and trained anew, on another machine, must be as good as the first."""
    if abs(known.get("fvu", 0.0) - found.get("fvu", 0.0)) > ALIKE:
        raise SystemExit(
            f"sae-{place}: FVU {found['fvu']:.3f}, that of the runs measured so far has "
            f"{known['fvu']:.3f}. Measure with that one, or all anew in another --output."
        )


def saes_of(kind: str) -> list[str]:
    """The places of a kind's SAEs, its own first."""
    place, _, variant = kind.partition("+")
    second = [variant] if variant and variant not in VARIANTS else []
    return [] if kind == RIVAL else [place, *second]


def cell(o: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """One training and parts of its change. kind: RIVAL, PLACE or PLACE+VARIANT of FPO."""
    places, variant = saes_of(kind), kind.partition("+")[2]
    base: dict[str, Any] = {
        "model": str(o.model), "data": str(o.work / "data"), "max_seq_length": o.max_seq_length,
        "top_k": o.top_k,
    }  # fmt: skip
    judging = base | reads(o, places[:1])
    objective: dict[str, Any] = {"objective": "dpo"}
    if places:
        objective = {"target_drift": o.target_drift} | VARIANTS.get(variant, {})
    if variant in ("all", "logits"):
        objective["feature_weights"] = str(weigh_all(o, variant, judging))
    out = o.work / f"run-{kind}-{seed}"
    own = base | reads(o, places) | objective | {"adapter_path": str(out), "seed": seed}
    own |= {"iters": o.iters, "batch_size": 1, "learning_rate": o.learning_rate, "val_batches": 0}
    own |= {"save_every": 40, "max_logp_drop": 1e9, **goes_on(out)}
    if o.all_blocks:
        own |= {"num_layers": -1, "adapt_above_sae": True}
    found: dict[str, Any] = {"kind": kind, "seed": seed, "points": []}
    try:
        for _ in pipeline.train(load_config(own), say=say):
            pass
    except Diverged as error:  # there is nothing to measure
        return found | {"diverged": str(error).partition(". ")[0]}  # the rest names folders
    whole = as_adapter(out, o.iters, o.work / f"at-{kind}-{seed}")
    judged = pipeline.evaluate_all(
        load_config(judging | {"objective": "dpo"}), adapter_paths=[str(whole)], scales=PARTS,
        split="test", say=say,
    )  # fmt: skip
    adapted = json.loads((out / "adapter_config.json").read_text())["num_layers"]
    points = [point(report) for report in judged.adapters.values()]
    return found | {"adapted_blocks": adapted, "points": points}


def reads(o: argparse.Namespace, places: Sequence[str]) -> dict[str, Any]:
    """Settings: the SAEs at these places, and the reference's scores with them."""
    saes = tuple(str(o.work / f"sae-{place}") for place in places)
    folder = o.work / "-".join(("reference", *(places or (RIVAL,))))
    return {"reference": str(folder)} | ({"sae": saes} if saes else {})


def weigh_all(o: argparse.Namespace, variant: str, settings: Mapping[str, Any]) -> Path:
    """A file that names every feature: of weight 1, or of its effect on the logits with mean 1."""
    from fpo_mlx.pipeline.job import read_sae

    config = load_config(dict(settings))
    place = config.reference.sae[0]
    path = o.work / f"{variant}-{Path(place).name}.csv"
    if path.exists():  # of an earlier seed
        return path
    sae = read_sae(place, config.reference, say)
    weights = np.ones(sae.n_features) if variant == "all" else on_logits(config, sae)
    kept = [{"feature": i, "weight": w} for i, w in enumerate((weights / weights.mean()).tolist())]
    write_weights(path, kept)
    return path


def on_logits(config: RunConfig, sae: SaeWeights) -> np.ndarray:
    """Variance over the vocabulary of what a unit of each feature adds to the logits, [F].

    On the direct path: by the final norm's gain and the head, no block between.

    A weight multiplies a squared move, so it is the square of an effect.
    """
    from fpo_mlx.judge.feature_page import logit_weights
    from fpo_mlx.pipeline.features import tapped_policy
    from fpo_mlx.pipeline.job import open_job

    policy = tapped_policy(open_job(config, say=say), None, say)
    variances = []
    for row in [] if sae.w_dec is None or sae.site is None else sae.w_dec:
        added = logit_weights(policy, sae.site, row)
        if added is not None:
            variances.append(float(added.var()))
    if len(variances) < sae.n_features:
        raise SystemExit(f"{sae.source} does not write into the stream; its logits are not known.")
    return np.array(variances)


def point(report: Any) -> dict[str, Any]:
    """A part of a run. Margins: nats per token; KL: nats per answer."""
    gained = np.array([gains(pair) for pair in report.pairs])  # [pairs, 2]
    said = report.summary
    return {
        "part": report.adapter_scale,
        KL: (said["kl/chosen"] + said["kl/rejected"]) / 2,
        MARGIN: np.round(gained[:, 0] - gained[:, 1], 5).tolist(),
        "of_sums": [round(_sum(pair), 4) for pair in report.pairs],
        "accuracy": said["rewards/accuracies"],
        "chosen_change": said["logps_per_token/chosen_change"],
        "drift": said["drift/rejected"] ** 0.5 if "drift/rejected" in said else None,
    }


def _sum(pair: Mapping[str, Any]) -> float:
    """The margin of a pair by its sums, nats: DPO's measure."""
    chosen, rejected = pair["chosen"], pair["rejected"]
    return chosen["logp"] - chosen["ref_logp"] - rejected["logp"] + rejected["ref_logp"]


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each kind and KL: the margin there, and above that of RIVAL and of its own place."""
    lines: dict[str, dict[int, list[Any]]] = {}
    for run in runs:
        pairs = len(run["points"][0][MARGIN])
        start = {KL: 0.0, MARGIN: [0.0] * pairs, "chosen_change": 0.0}
        line = sorted([start, *run["points"]], key=lambda p: p[KL])
        lines.setdefault(run["kind"], {})[run["seed"]] = line
    found = []
    for kind, own in lines.items():
        others = [other for other in (RIVAL, kind.partition("+")[0]) if other != kind]
        rivals = {other: lines[other] for other in others if other in lines}
        for level in LEVELS:
            if here := at_level(own, rivals, level):
                found.append({"kind": kind, "kl": level, **here})
    return found


def at_level(
    own: Mapping[int, list[Any]], rivals: Mapping[str, Mapping[int, list[Any]]], level: float
) -> dict[str, Any]:
    """Where the KL is `level`, of the seeds that reach it; nothing where none does."""

    def reached(line: list[Any], name: str) -> np.ndarray | None:
        return frontier_show.at(line, level, name)

    def chosen(lines: Mapping[int, list[Any]], seeds: Sequence[int]) -> float:
        return float(np.mean([reached(lines[s], "chosen_change") for s in seeds]))

    there = [s for s, line in own.items() if reached(line, MARGIN) is not None]
    if not there:
        return {}
    found: dict[str, Any] = {"seeds": len(there), "chosen_change": chosen(own, there)}
    found["margin"] = float(np.mean([reached(own[s], MARGIN) for s in there]))
    for rival, its in rivals.items():
        both = [s for s in there if s in its and reached(its[s], MARGIN) is not None]
        if both:
            ours, theirs = (np.array([reached(of[s], MARGIN) for s in both]) for of in (own, its))
            gap = intervals.gap(ours, theirs)
            found[f"above {rival}"] = {
                "seeds": len(both),
                "margin": gap["mean"],
                "chosen_change": chosen(own, both) - chosen(its, both),
                "interval": gap["drawn"],
                "t": gap.get("t"),
                "of_seeds": gap["of_seeds"],
            }
    return found


if __name__ == "__main__":
    main()
