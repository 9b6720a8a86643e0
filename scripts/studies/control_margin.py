"""Feature control at equal margin: does holding or projecting out a behaviour's features hold it?

    python scripts/studies/control_margin.py [--behaviour list|opening] [--seeds 3] [--work DIR]
    python scripts/studies/control_margin.py … --seed 1     this one only: a core for each, the
        second once the first one trains
    python scripts/studies/control_margin.py … --family out     what that one compares, first

Five ways to train on the same pairs: FPO; with the behaviour's features held (`--feature-weights`),
or projected out (`--project-out`); each with as many unrelated ones of equal activity in their
place. What holds also learns less, so they need not end at the same margin. Of those that are to be
compared (FAMILIES) the one that learned least sets a margin on held-out pairs; each of them
answers the held-out prompts at the part of its change that was measured nearest to it
(`--levels`: shares of that margin). Compared are the rates of the behaviour in `--answers` sampled
answers with the same noise, 95 % by bootstrap over seeds and prompts; the margins of all, which are
means over few pairs, stand beside them. What is trained is kept in --work, what was measured in
results/control_margin_BEHAVIOUR/: a stopped study goes on, and what was measured is not measured
again on another machine. `--smoke` takes minutes and proves nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import control
import frontier_show
import numpy as np
from texts import (
    ROOT,
    Steps,
    answers_apart,
    as_adapter,
    begin,
    gains,
    goes_on,
    is_list,
    rows,
    say,
    study_parser,
    write_rows,
)

from fpo_mlx import machine, pipeline
from fpo_mlx.config import Sampling, load_config
from fpo_mlx.data.feature_files import write_weights
from fpo_mlx.storage import files

FREE, BASE = "fpo", "base"
KINDS: dict[str, tuple[str | None, str | None]] = {  # setting, whose features
    FREE: (None, None),
    "held": ("feature_weights", "own"),
    "held, unrelated": ("feature_weights", "others"),
    "out": ("project_out", "own"),
    "out, unrelated": ("project_out", "others"),
}
FAMILIES = {  # what is compared at one margin; unrelated features may slow learning more
    "held": (FREE, "held", "held, unrelated"),
    "held alone": (FREE, "held"),
    "out": (FREE, "out", "out, unrelated"),
}
OPENING = re.compile(r"(sure|certainly|of course|absolutely|here(?:\s+(?:is|are)|['’]s))\b", re.I)
TOKENS = {"list": 64, "opening": 16}  # of a sampled answer: what shows the behaviour
PROMPT = 250  # characters at most, held out or of texts that are looked at: leaves room, costs less
ROWS = 128  # answers at once: on a CPU every step packs all weights anew, whatever the rows


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, "control-margin-work")
    parser.add_argument("--output", type=Path, help="folder of what is measured")
    parser.add_argument("--behaviour", choices=list(TOKENS), default="list")
    parser.add_argument("--iters", type=int, default=200, help="updates of one pair")
    parser.add_argument("--train-pairs", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=40, help="held-out pairs that set the margin")
    parser.add_argument("--prompts", type=int, default=100, help="held out, answered")
    parser.add_argument("--answers", type=int, default=1000, help="sampled per model and seed")
    parser.add_argument("--levels", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, action="append", default=[], help="these, not all")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", default=[])
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--texts", type=int, default=60, help="of each kind, to find features")
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--weight", type=float, default=10.0)
    parser.add_argument("--max-seq-length", type=int, default=224)
    parser.add_argument("--smoke", action="store_true", help="a run that proves nothing")
    o = parser.parse_args(words)
    if not all(0 < level <= 1 for level in o.levels):
        parser.error(f"--levels: found {o.levels}, wanted shares above 0, at most 1")
    o.work = o.work / f"{o.behaviour}{'-smoke' if o.smoke else ''}"
    if o.smoke:
        o.seeds, o.iters, o.train_pairs, o.pairs, o.prompts = 1, 2, 2, 2, 2
        o.answers, o.texts, o.features = 4, 6, 2
    return o


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    model, steps = begin(o, "levels", "family")
    base = {
        "model": model, "sae": (str(o.sae),), "data": str(split(o)),
        "max_seq_length": o.max_seq_length,
    }  # fmt: skip
    place = o.output or ROOT / "scripts" / "studies" / "results" / f"control_margin_{o.behaviour}"
    anywhere = {"model": Path(model).name, "sae": o.sae.name, "data": o.data.name}
    anywhere |= {"tokens": str(TOKENS[o.behaviour]), "prompt": str(PROMPT)}
    measured = Steps(o.work / "found" if o.smoke else place, steps.settings | anywhere)
    named = measured("features", partial(features, o, base))
    for whose, kept in named.items():  # what was trained with, on this machine or another
        weighted = [{"feature": one["feature"], "weight": o.weight} for one in kept]
        write_weights(features_of(o, whose), weighted)
    for seed in o.seed or range(o.seeds):
        one_seed(o, base, measured, seed)


def one_seed(o: argparse.Namespace, base: dict[str, Any], measured: Steps, seed: int) -> None:
    """All kinds of the families at equal margins; what is there is not measured again."""
    families = {way: kinds for way, kinds in FAMILIES.items() if way in (o.family or FAMILIES)}
    named = {kind: f"{kind.replace(', ', '-')}-{seed}" for kind in KINDS}

    def whole(kind: str) -> dict[str, Any]:
        return {"margins": margins(base, trained(o, base, kind, seed), 1.0)}

    def point(way: str, kind: str, level: float, margin: float) -> dict[str, Any]:
        adapter = trained(o, base, kind, seed)
        part, found = part_at(base, adapter, wholes[kind], margin)
        about = {"way": way, "kind": kind, "seed": seed, "level": level, "part": part}
        there = sampled(measured, about)  # by another family, whose margin is the same
        return about | {"margins": found, "rates": there or rates(o, base, adapter, part, seed)}

    wholes = {
        kind: measured(f"{name}-whole", partial(whole, kind))["margins"]
        for kind, name in named.items()
        if any(kind in kinds for kinds in families.values())
    }
    for way, kinds in families.items():
        least = min(float(np.mean(wholes[kind])) for kind in kinds)
        if least <= 0:
            say(f"seed {seed}, {way}: a kind of it did not learn the preference; left out")
            continue
        for level, kind in itertools.product(o.levels, kinds):
            step = partial(point, way, kind, level, level * least)
            measured(f"{named[kind]}-by-{way.replace(' ', '-')}-at-{level:g}", step)
            write(measured)
    about = {"way": "", "kind": BASE, "seed": seed, "level": 0.0, "part": 0.0}
    measured(f"{BASE}-{seed}", lambda: about | {"rates": rates(o, base, None, 1.0, seed)})
    write(measured)


def sampled(measured: Steps, about: Mapping[str, Any]) -> list[float] | None:
    """The rates of this part of an adapter, where they are known."""
    same = ("kind", "seed", "part")
    points = (found for found in measured.values().values() if "rates" in found)
    return next((p["rates"] for p in points if all(p[n] == about[n] for n in same)), None)


def part_at(
    base: dict[str, Any], adapter: Path, whole: list[float], margin: float
) -> tuple[float, list[float]]:
    """The part of an adapter nearest to this margin, and its margins; as the end of a run finds it.

    whole: the margins of part 1, per pair.
    """
    from fpo_mlx.train.landing import meeting

    seen = {1.0: whole}

    def look(part: float) -> float:
        seen[part] = margins(base, adapter, part)
        return float(np.mean(seen[part]))

    part = meeting(look, float(np.mean(whole)), margin) or 1.0
    return part, seen[part]


def write(measured: Steps) -> None:
    """The comparison, from all points that are there."""
    points = [found for found in measured.values().values() if "rates" in found]
    levels = sorted({point["level"] for point in points if point["kind"] != BASE})
    result = {
        f"{way} at {level:g}": found
        for way, level in itertools.product(FAMILIES, levels)
        if (found := compared(points, way, level))
    }
    files.write_json(measured.folder.parent / "compared.json", result)
    print(json.dumps(result, indent=2), flush=True)
    with suppress(ImportError):
        draw(result, measured.folder.parent / "rates.svg")


def shows(text: str, behaviour: str) -> bool:
    return is_list(text) if behaviour == "list" else bool(OPENING.match(text.strip()))


def split(o: argparse.Namespace) -> Path:
    """The first pairs to train on; of the others those with short prompts are held out."""
    folder = o.work / "data"
    every = rows(o.data / "train.jsonl")
    left = [*rows(o.data / "valid.jsonl"), *every[o.train_pairs :]]
    short = [row for row in left if len(row["prompt"]) <= PROMPT][: max(o.prompts, o.pairs)]
    write_rows(folder / "train.jsonl", every[: o.train_pairs])
    write_rows(folder / "valid.jsonl", short[: o.pairs])
    write_rows(folder / "asked.jsonl", [{"prompt": row["prompt"]} for row in short[: o.prompts]])
    return folder


def text_sets(o: argparse.Namespace) -> tuple[Path, Path]:
    """Training answers with the behaviour and without; no asked prompt has one."""
    asked = {row["prompt"] for row in rows(o.work / "data" / "asked.jsonl")}
    short = (
        row
        for row in rows(o.data / "train.jsonl")
        if len(row["prompt"]) <= PROMPT and row["prompt"] not in asked
    )
    return answers_apart(short, partial(shows, behaviour=o.behaviour), o.texts, o.work)


def features_of(o: argparse.Namespace, whose: str) -> Path:
    return o.work / f"{whose}.csv"


def features(o: argparse.Namespace, base: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The behaviour's, and as many that are as active and tell nothing of it."""
    texts = text_sets(o)
    found = pipeline.find_features(
        load_config(base), positive=texts[0], negative=texts[1], limit=o.texts, top=o.features,
        say=say,
    )  # fmt: skip
    seen = pipeline.text_activations(load_config(base), texts, limit=o.texts, say=say)
    others = control.twins([one.feature for one in found], seen[0].mean, seen[1].mean)
    return {"own": [{"feature": one.feature, "auc": one.auc} for one in found], "others": others}


def trained(o: argparse.Namespace, base: dict[str, Any], kind: str, seed: int) -> Path:
    """The adapter of a kind; trained, or gone on with, where it is not there."""
    folder = o.work / f"{kind.replace(', ', '-')}-{seed}"
    ready = folder.with_name(f"at-{folder.name}")
    if (ready / "adapters.safetensors").exists():
        return ready
    setting, whose = KINDS[kind]
    own = base | ({setting: str(features_of(o, whose))} if setting and whose else {})
    own |= {"adapter_path": str(folder), "seed": seed, "iters": o.iters, "batch_size": 1}
    own |= {"learning_rate": o.learning_rate, "val_batches": 0}
    own |= {"max_margin": 1e3, "max_logp_drop": 1e9}  # weighted D is in |u| / beta; all end alike
    own |= {"save_every": min(50, o.iters), **goes_on(folder)}
    for _ in pipeline.train(load_config(own), say=say):
        pass
    return as_adapter(folder, o.iters, ready)


def margins(base: dict[str, Any], adapter: Path, part: float) -> list[float]:
    """On held-out pairs: nats per token of each side, against the reference, per pair."""
    judged = pipeline.evaluate_all(
        load_config(base | {"objective": "dpo"}), adapter_paths=[str(adapter)], scales=(part,),
        split="valid", measure_kl=False, say=say,
    )  # fmt: skip
    (report,) = judged.adapters.values()
    return [chosen - rejected for chosen, rejected in map(gains, report.pairs)]


def rates(
    o: argparse.Namespace, base: dict[str, Any], adapter: Path | None, part: float, seed: int
) -> list[float]:
    """The share of each prompt's sampled answers that show the behaviour; noise by the seed."""
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.judge.sampling import sample_all
    from fpo_mlx.judge.slots import Asked
    from fpo_mlx.model.open import open_model

    model = open_model(base["model"], adapter=adapter, scale=part).model
    tokenizer = load_tokenizer(base["model"])
    prompts = [row["prompt"] for row in rows(o.work / "data" / "asked.jsonl")]
    each = -(-o.answers // len(prompts))
    asked = [
        Asked(
            np.array(tokenizer.prompt_tokens([{"role": "user", "content": p}]), dtype=np.int32),
            [(seed, i, j) for j in range(each)],
        )
        for i, p in enumerate(prompts)
    ]
    seen = np.zeros(len(prompts))
    settings = Sampling(TOKENS[o.behaviour], 1.0, seed)
    answers = sample_all(model, asked, settings, tokenizer.eos_token_ids, rows=ROWS)
    for i, _, answer in answers:
        seen[i] += shows(tokenizer.decode(answer.tokens.tolist(), skip_special=True), o.behaviour)
    return (seen / each).tolist()


def compared(points: Sequence[Mapping[str, Any]], way: str, level: float) -> dict[str, Any]:
    """Of the seeds that have all kinds of a family: rates, gaps, margins, each with its 95 %."""
    kinds, own = FAMILIES[way], [p for p in points if (p["way"], p["level"]) == (way, level)]
    found = {(p["kind"], p["seed"]): p for p in own}
    seeds = sorted({s for _, s in found if all((kind, s) in found for kind in kinds)})
    if not seeds:
        return {}

    def of(name: str, kind: str) -> np.ndarray:
        return np.array([found[kind, s][name] for s in seeds])

    rates = {kind: of("rates", kind) for kind in kinds}
    begun = {p["seed"]: p["rates"] for p in points if p["kind"] == BASE}
    pairs = list(itertools.combinations(kinds, 2))
    if all(s in begun for s in seeds):
        rates[BASE] = np.array([begun[s] for s in seeds])
        pairs.append((FREE, BASE))
    margins = {kind: of("margins", kind) for kind in kinds}
    return {
        "seeds": len(seeds),
        "parts": {kind: float(of("part", kind).mean()) for kind in kinds},
        "margins": {kind: with_interval(one, 0 * one) for kind, one in margins.items()},
        "margins less fpo's": {
            kind: with_interval(margins[kind], margins[FREE]) for kind in kinds if kind != FREE
        },
        "rates": {kind: with_interval(one, 0 * one) for kind, one in rates.items()},
        "gaps": {f"{a} less {b}": with_interval(rates[a], rates[b]) for a, b in pairs},
    }


def with_interval(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Mean difference of [seeds, prompts], and its 95 %."""
    return [float(ours.mean() - theirs.mean()), *frontier_show.interval(ours, theirs, np.mean)]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Rate of the behaviour against the margin, a line for each kind from the base on."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "control"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FAMILIES), figsize=(11, 4.5), sharey=True)
    for (way, kinds), axis in zip(FAMILIES.items(), axes, strict=True):
        there = [
            f for name, f in result.items() if name.startswith(f"{way} at ") and BASE in f["rates"]
        ]
        for kind in kinds if there else ():
            line = [(0.0, there[0]["rates"][BASE])]
            line += [(found["margins"][kind][0], found["rates"][kind]) for found in there]
            low, high = ([abs(rate[0] - rate[end]) for _, rate in line] for end in (1, 2))
            axis.errorbar(
                [margin for margin, _ in line], [rate[0] for _, rate in line], yerr=[low, high],
                label=kind, capsize=3, linewidth=1,
            )  # fmt: skip
        axis.set(xlabel="margin on held-out pairs, nats per token", title=way)
        if there:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("answers that show it")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
