"""Feature control at equal margin: does holding or projecting out a behaviour's features hold it?

    python scripts/studies/control_margin.py [--behaviour list|opening] [--seeds 3] [--work DIR]
    python scripts/studies/control_margin.py … --seed 1     this one only: a core for each

Five ways to train on the same pairs: FPO; with the behaviour's features held (`--feature-weights`),
or projected out (`--project-out`); each with as many unrelated ones of equal activity in their
place. What holds also learns less, so no two of them end at the same margin. Of each adapter parts
(PARTS) are judged on held-out pairs; the lowest of their highest margins is one that all of them
reach, and each answers the held-out prompts at the part of itself that has this margin (`--levels`:
shares of it). Compared are the rates of the behaviour in `--answers` sampled
answers with the same noise, 95 % by bootstrap over seeds and prompts. What is trained is kept in
--work, what was measured in results/control_margin_BEHAVIOUR/: a stopped study goes on, and what
was measured is not measured again on another machine. `--smoke` takes minutes and proves nothing.
"""

from __future__ import annotations

import argparse
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
    as_adapter,
    begin,
    goes_on,
    is_list,
    rows,
    say,
    study_parser,
    write_rows,
)

from fpo_mlx import machine, pipeline
from fpo_mlx.config import Sampling, load_config
from fpo_mlx.storage import files

FREE, BASE = "fpo", "base"
KINDS: dict[str, tuple[str | None, str | None]] = {  # setting, whose features
    FREE: (None, None),
    "held": ("feature_weights", "own"),
    "held, unrelated": ("feature_weights", "others"),
    "out": ("project_out", "own"),
    "out, unrelated": ("project_out", "others"),
}
PARTS = (0.25, 0.5, 1.0)  # of an adapter's change; beyond the whole nothing is held as it was
OPENING = re.compile(r"(sure|certainly|of course|absolutely|here(?:\s+(?:is|are)|['’]s))\b", re.I)
TOKENS = {"list": 64, "opening": 16}  # of a sampled answer: what shows the behaviour
PROMPT = 250  # characters at most, held out or of texts that are looked at: leaves room, costs less


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
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--texts", type=int, default=60, help="of each kind, to find features")
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--weight", type=float, default=100.0)
    parser.add_argument("--max-seq-length", type=int, default=224)
    parser.add_argument("--smoke", action="store_true", help="a run that proves nothing")
    o = parser.parse_args(words)
    if o.smoke:
        o.seeds, o.iters, o.train_pairs, o.pairs, o.prompts = 1, 2, 2, 2, 2
        o.answers, o.texts, o.features = 4, 6, 2
    return o


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    model, steps = begin(o, "levels")
    base = {
        "model": model, "sae": (str(o.sae),), "data": str(split(o)),
        "max_seq_length": o.max_seq_length,
    }  # fmt: skip
    texts = text_sets(o)
    found = steps("features", lambda: find(o, base, texts))
    others = steps("others", lambda: find_others(o, base, found, texts))
    place = o.output or ROOT / "scripts" / "studies" / "results" / f"control_margin_{o.behaviour}"
    anywhere = {"model": Path(model).name, "sae": o.sae.name, "data": o.data.name}
    measured = Steps(o.work / "smoke" if o.smoke else place, steps.settings | anywhere)
    measured("features", lambda: {"own": found, "others": others})
    for seed in o.seed or range(o.seeds):
        one_seed(o, base, measured, seed)


def one_seed(o: argparse.Namespace, base: dict[str, Any], measured: Steps, seed: int) -> None:
    """All kinds at equal margins; what is there is not measured again."""
    named = {kind: f"{kind.replace(', ', '-')}-{seed}" for kind in KINDS}

    def curve(kind: str) -> list[float]:
        return margins(base, trained(o, base, kind, seed))

    def point(kind: str, level: float, margin: float) -> dict[str, Any]:
        adapter = None if kind == BASE else trained(o, base, kind, seed)
        part = 0.0 if kind == BASE else part_at(curves[kind], margin)
        about = {"kind": kind, "seed": seed, "level": level, "part": part, "margin": margin}
        return about | {"rates": rates(o, base, adapter, part, seed)}

    curves = {
        kind: measured(f"{name}-margins", partial(curve, kind)) for kind, name in named.items()
    }
    most = reached_by_all(curves)
    for level in o.levels:
        for kind, name in named.items():
            measured(f"{name}-at-{level:g}", partial(point, kind, level, level * most))
    measured(f"{BASE}-{seed}", partial(point, BASE, 0.0, 0.0))
    write(measured)


def reached_by_all(curves: Mapping[str, Sequence[float]]) -> float:
    """The lowest of the kinds' highest margins, nats per token; curves: margin of each of PARTS."""
    most = {kind: max(curve) for kind, curve in curves.items()}
    if min(most.values()) <= 0:
        raise SystemExit(f"Not every kind learned the preference; highest margins: {most}")
    return min(most.values())


def part_at(curve: Sequence[float], margin: float) -> float:
    """The part of an adapter that first has this margin, by straight lines between PARTS."""
    line = list(zip((0.0, *PARTS), (0.0, *curve), strict=True))
    for (part, low), (end, high) in zip(line, line[1:], strict=False):
        if low <= margin <= high:
            return part + (end - part) * (margin - low) / (high - low)
    raise ValueError(f"a margin of {margin} is not between those of {line}")


def write(measured: Steps) -> None:
    """The comparison, from all points that are there."""
    points = [found for found in measured.values().values() if "rates" in found]
    result = {f"at {level:g}": compared(points, level) for level in levels_of(points)}
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
    """Training answers with the behaviour and without, by one writer."""
    sets: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for row in rows(o.data / "train.jsonl"):
        own = sets[shows(row["chosen"], o.behaviour)]
        if len(own) < o.texts and len(row["prompt"]) <= PROMPT:
            own.append({"prompt": row["prompt"], "response": row["chosen"]})
    return (
        write_rows(o.work / "with.jsonl", sets[True]),
        write_rows(o.work / "without.jsonl", sets[False]),
    )


def features_of(o: argparse.Namespace, whose: str) -> Path:
    return o.work / f"{whose}.csv"


def find(
    o: argparse.Namespace, base: dict[str, Any], texts: tuple[Path, Path]
) -> list[dict[str, Any]]:
    found = pipeline.find_features(
        load_config(base), positive=texts[0], negative=texts[1], limit=o.texts, top=o.features,
        say=say,
    )  # fmt: skip
    kept = [{"feature": one.feature, "weight": o.weight} for one in found]
    control.write_weights(features_of(o, "own"), kept)
    return [{**row, "auc": one.auc} for row, one in zip(kept, found, strict=True)]


def find_others(
    o: argparse.Namespace, base: dict[str, Any], found: list[dict[str, Any]],
    texts: tuple[Path, Path],
) -> list[dict[str, Any]]:  # fmt: skip
    seen = pipeline.text_activations(load_config(base), texts, limit=o.texts, say=say)
    twins = control.twins([one["feature"] for one in found], seen[0].mean, seen[1].mean)
    kept = [{"feature": twin["feature"], "weight": o.weight} for twin in twins]
    control.write_weights(features_of(o, "others"), kept)
    return twins


def trained(o: argparse.Namespace, base: dict[str, Any], kind: str, seed: int) -> Path:
    """The adapter of a kind; trained, or gone on with, where it is not there."""
    folder = o.work / f"{kind.replace(', ', '-')}-{seed}"
    ready = folder.with_name(f"at-{folder.name}")
    if (ready / "adapters.safetensors").exists():
        return ready
    setting, whose = KINDS[kind]
    own = base | ({setting: str(features_of(o, whose))} if setting and whose else {})
    own |= {"adapter_path": str(folder), "seed": seed, "iters": o.iters, "batch_size": 1}
    own |= {
        "learning_rate": o.learning_rate,
        "val_batches": 0,
        "max_margin": 1e3,
    }  # weights are in u
    own |= {"save_every": min(50, o.iters), **goes_on(folder)}
    for _ in pipeline.train(load_config(own), say=say):
        pass
    return as_adapter(folder, o.iters, ready)


def margins(base: dict[str, Any], adapter: Path) -> list[float]:
    """Of each of PARTS, on held-out pairs: nats per token."""
    judged = pipeline.evaluate_all(
        load_config(base | {"objective": "dpo"}), adapter_paths=[str(adapter)], scales=PARTS,
        split="valid", measure_kl=False, say=say,
    )  # fmt: skip
    return [margin_of(report.pairs) for report in judged.adapters.values()]


def margin_of(pairs: Sequence[Mapping[str, Any]]) -> float:
    """Nats per token of each side, against the reference; mean over pairs."""

    def gain(side: Mapping[str, Any]) -> float:
        return (side["logp"] - side["ref_logp"]) / side["tokens"]

    return float(np.mean([gain(pair["chosen"]) - gain(pair["rejected"]) for pair in pairs]))


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
    for i, _, answer in sample_all(model, asked, settings, tokenizer.eos_token_ids):
        seen[i] += shows(tokenizer.decode(answer.tokens.tolist(), skip_special=True), o.behaviour)
    return (seen / each).tolist()


def levels_of(points: Sequence[Mapping[str, Any]]) -> list[float]:
    return sorted({point["level"] for point in points if point["kind"] != BASE})


def compared(points: Sequence[Mapping[str, Any]], level: float) -> dict[str, Any]:
    """Rates of every kind at its margin, of the seeds that have all kinds; gaps with 95 %."""
    found = {(p["kind"], p["seed"]): p for p in points if p["level"] == level}
    seeds = sorted({s for _, s in found if all((kind, s) in found for kind in KINDS)})
    if not seeds:
        return {}
    of = {kind: np.array([found[kind, s]["rates"] for s in seeds]) for kind in KINDS}
    begun = {p["seed"]: p["rates"] for p in points if p["kind"] == BASE}
    gaps = {
        f"{FREE} less {kind}": (of[FREE], of[kind]) for kind in KINDS if kind != FREE
    } | {
        f"{kind}, unrelated less {kind}": (of[f"{kind}, unrelated"], of[kind])
        for kind in ("held", "out")
    }  # fmt: skip
    if all(s in begun for s in seeds):
        of[BASE] = np.array([begun[s] for s in seeds])
        gaps[f"{FREE} less {BASE}"] = (of[FREE], of[BASE])
    means = [float(np.mean([found[kind, s]["part"] for s in seeds])) for kind in KINDS]
    return {
        "seeds": len(seeds),
        "margin": float(np.mean([found[FREE, s]["margin"] for s in seeds])),
        "parts": dict(zip(KINDS, means, strict=True)),
        "rates": {kind: with_interval(rates, np.zeros_like(rates)) for kind, rates in of.items()},
        "gaps": {name: with_interval(*pair) for name, pair in gaps.items()},
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

    there = [found for found in result.values() if BASE in found.get("rates", {})]
    if not there:
        return
    figure, axis = pyplot.subplots(figsize=(6.5, 4.5))
    for number, kind in enumerate(KINDS):
        line = [(0.0, there[0]["rates"][BASE]), *((f["margin"], f["rates"][kind]) for f in there)]
        low, high = ([abs(rate[0] - rate[end]) for _, rate in line] for end in (1, 2))
        shift = 1 + (number - len(KINDS) // 2) / 100  # bars beside one another
        axis.errorbar(
            [margin * shift for margin, _ in line], [rate[0] for _, rate in line],
            yerr=[low, high], label=kind, capsize=3, linewidth=1,
        )  # fmt: skip
    axis.set(xlabel="margin on held-out pairs, nats per token", ylabel="answers that show it")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
