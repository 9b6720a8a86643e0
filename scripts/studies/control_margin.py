"""Feature control at equal margin: does holding or projecting out a behaviour's features hold it?

    python scripts/studies/control_margin.py [--behaviour list|opening] [--seeds 3] [--work DIR]
    python scripts/studies/control_margin.py … --seed 1     this one only: a core for each, the
        second once the first one trains
    python scripts/studies/control_margin.py … --family out     what that one compares, first

Five ways to train on the same pairs: FPO; with the behaviour's features held (`--feature-weights`),
or projected out (`--project-out`); each with as many unrelated ones in their place, as active and
with as much of the mean stream along them, others for each seed. What holds also learns less, so
they need not end at the same margin. Of those that are to be compared (FAMILIES) the one that
learned least sets a margin on held-out pairs; each of them answers the held-out prompts at the part
of its change that was measured nearest to it (`--levels`: shares of that margin). Compared are the
rates of the behaviour in the first tokens of `--answers` sampled answers with the same noise. The
gaps that the study is for are `fpo less out` and `out less out, unrelated` of lists, named before
more than one seed was seen; all else describes. Two intervals of 95 % stand there, bootstrap over
seeds and prompts and Student's t over the seeds' gaps: the first is too narrow where runs differ
much, the second where they do not. How likely the base finds the answers, nats per token, says
whether they are still language. What is trained, and the answers, are kept in --work (FPO is the
same for both behaviours: train one of them first), what was measured in
results/control_margin_BEHAVIOUR/: a stopped study goes on. On another machine bring --work along:
what is trained anew differs in its last bits, and is not put to what was measured. `--smoke` takes
minutes and proves nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from control_margin_features import ALONG, PROMPT, SHOWN, features, features_of, shows, split
from control_margin_show import BASE, FAMILIES, FREE, write
from texts import (
    ROOT,
    Steps,
    as_adapter,
    begin,
    gains,
    goes_on,
    rows,
    say,
    settings_of,
    study_parser,
    write_rows,
)

from fpo_mlx import machine, pipeline
from fpo_mlx.config import Sampling, load_config
from fpo_mlx.data.feature_files import write_weights
from fpo_mlx.storage import files

Sides = Sequence[Sequence[float]]  # of each pair what (chosen, rejected) gained, nats per token
KINDS: dict[str, tuple[str | None, str | None]] = {  # setting, whose features
    FREE: (None, None),
    "held": ("feature_weights", "own"),
    "held, unrelated": ("feature_weights", "others"),
    "out": ("project_out", "own"),
    "out, unrelated": ("project_out", "others"),
}
TOKENS = {"list": 64, "opening": 16}  # of a sampled answer: what shows the behaviour
READ = 2  # answers to a prompt that the base reads
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
    parser.add_argument(
        "--by", choices=["auc", "attribution"], default="auc",
        help="features that tell texts with the behaviour apart, or that the base begins it by",
    )  # fmt: skip
    parser.add_argument("--weight", type=float, default=10.0)
    parser.add_argument("--max-seq-length", type=int, default=224)
    parser.add_argument("--smoke", action="store_true", help="a run that proves nothing")
    o = parser.parse_args(words)
    if not all(0 < level <= 1 for level in o.levels):
        parser.error(f"--levels: found {o.levels}, wanted shares above 0, at most 1")
    if any(seed not in range(o.seeds) for seed in o.seed):
        parser.error(f"--seed {o.seed}: wanted seeds below --seeds {o.seeds}")
    o.shown, o.along, o.sets = SHOWN[o.behaviour], ALONG, o.seeds
    o.named = o.behaviour if o.by == "auc" else f"{o.behaviour}_{o.by}"
    o.work = o.work / f"{o.named}{'-smoke' if o.smoke else ''}"
    if o.smoke:
        o.seeds, o.iters, o.train_pairs, o.pairs, o.prompts = 1, 2, 2, 2, 2
        o.answers, o.texts, o.features = 4, 6, 2
    return o


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    model, steps = begin(o, "levels", "family", "by", "named")
    base = {
        "model": model, "sae": (str(o.sae),), "data": str(split(o)),
        "max_seq_length": o.max_seq_length,
    }  # fmt: skip
    place = o.output or ROOT / "scripts" / "studies" / "results" / f"control_margin_{o.named}"
    anywhere = {"model": Path(model).name, "sae": o.sae.name, "data": o.data.name}
    anywhere |= {} if o.by == "auc" else {"by": o.by}  # what was measured first does not say it
    anywhere |= {"tokens": str(TOKENS[o.behaviour]), "prompt": str(PROMPT)}
    measured = Steps(o.work / "found" if o.smoke else place, steps.settings | anywhere)
    named = measured("features", partial(features, o, base))
    for seed in o.seed or range(o.seeds):
        for whose, kept in (("own", named["own"]), ("others", named["others"][seed])):
            weighted = [{"feature": one["feature"], "weight": o.weight} for one in kept]
            write_weights(features_of(o, whose, seed), weighted)  # also on another machine
        one_seed(o, base, measured, seed)


def one_seed(o: argparse.Namespace, base: dict[str, Any], measured: Steps, seed: int) -> None:
    """All kinds of the families at equal margins; what is there is not measured again."""
    families = {way: kinds for way, kinds in FAMILIES.items() if way in (o.family or FAMILIES)}
    named = {kind: f"{kind.replace(', ', '-')}-{seed}" for kind in KINDS}

    def whole(kind: str) -> dict[str, Any]:
        adapter = trained(o, base, kind, seed)
        return {"adapter": digest_of(adapter), "sides": sides(base, adapter, 1.0)}

    def point(way: str, kind: str, level: float, margin: float) -> dict[str, Any]:
        adapter, known = trained(o, base, kind, seed), wholes[kind]
        if digest_of(adapter) != known["adapter"]:
            raise SystemExit(
                f"{adapter} is not what {named[kind]}-whole.json was measured with. Bring the "
                f"--work of then along, or remove {named[kind]}-*.json to measure it anew."
            )
        part, found = part_at(base, adapter, known["sides"], margin)
        about = {"way": way, "kind": kind, "seed": seed, "level": level, "part": part}
        there = sampled(measured, about)  # by another family, whose margin is the same
        return about | {"sides": found} | (there or answered(o, base, adapter, part, seed))

    def read(step: str, name: str, found: Mapping[str, Any]) -> None:
        path = answers_of(o, name, seed, found["part"])
        if path.exists():
            measured(f"{step}-read", partial(read_by_base, base, path, found))
        else:
            say(f"{path} is not here, so the base does not read it")

    wholes = {
        kind: measured(f"{name}-whole", partial(whole, kind))
        for kind, name in named.items()
        if any(kind in kinds for kinds in families.values())
    }
    for way, kinds in families.items():
        least = min(margin_of(wholes[kind]["sides"]) for kind in kinds)
        if least <= 0:
            say(f"seed {seed}, {way}: a kind of it did not learn the preference; left out")
            continue
        for level, kind in itertools.product(o.levels, kinds):
            step = partial(point, way, kind, level, level * least)
            name = f"{named[kind]}-by-{way.replace(' ', '-')}-at-{level:g}"
            found = measured(name, step)
            read(name, f"at-{named[kind]}", found)
            write(measured)
    about = {"way": "", "kind": BASE, "seed": seed, "level": 0.0, "part": 0.0}
    found = measured(f"{BASE}-{seed}", lambda: about | answered(o, base, None, 1.0, seed))
    read(f"{BASE}-{seed}", BASE, found | {"part": 1.0})
    write(measured)


def digest_of(adapter: Path) -> str:
    return files.sha256_of(adapter / "adapters.safetensors")


def sampled(measured: Steps, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `answered` gave for this part of an adapter, where that is known."""
    same = ("kind", "seed", "part")
    points = (found for found in measured.values().values() if "rates" in found)
    found = next((p for p in points if all(p[n] == about[n] for n in same)), None)
    return found and {name: found[name] for name in ("rates", "answers")}


def margin_of(sides: Sides) -> float:
    return float(np.mean([chosen - rejected for chosen, rejected in sides]))


def part_at(
    base: dict[str, Any], adapter: Path, whole: Sides, margin: float
) -> tuple[float, Sides]:
    """The part of an adapter nearest to this margin, and its sides; as the end of a run finds it.

    whole: the sides of part 1, per pair.
    """
    from fpo_mlx.train.landing import meeting

    seen = {1.0: whole}

    def look(part: float) -> float:
        seen[part] = sides(base, adapter, part)
        return margin_of(seen[part])

    part = meeting(look, margin_of(whole), margin) or 1.0
    return part, seen[part]


def trained(o: argparse.Namespace, base: dict[str, Any], kind: str, seed: int) -> Path:
    """The adapter of a kind; trained, or gone on with, where it is not there."""
    place = o.work
    if kind == FREE:
        place = o.work.with_name("smoke" if o.smoke else "both")
        own = ("behaviour", "shown", "along", "sets", "texts", "features", "weight", "prompts")
        own += ("answers", "pairs")
        Steps(
            place, settings_of(o, "levels", "family", "by", "named", *own)
        )  # refuses what others trained
    folder = place / f"{kind.replace(', ', '-')}-{seed}"
    ready = folder.with_name(f"at-{folder.name}")
    if (ready / "adapters.safetensors").exists():
        return ready
    setting, whose = KINDS[kind]
    own = base | ({setting: str(features_of(o, whose, seed))} if setting and whose else {})
    own |= {"adapter_path": str(folder), "seed": seed, "iters": o.iters, "batch_size": 1}
    own |= {"learning_rate": o.learning_rate, "val_batches": 0}
    own |= {"max_margin": 1e3, "max_logp_drop": 1e9}  # weighted D is in |u| / beta; all end alike
    own |= {"save_every": min(50, o.iters), **goes_on(folder)}
    for _ in pipeline.train(load_config(own), say=say):
        pass
    return as_adapter(folder, o.iters, ready)


def sides(base: dict[str, Any], adapter: Path, part: float) -> Sides:
    """Of each held-out pair: what chosen and rejected gained on the reference, nats per token."""
    judged = pipeline.evaluate_all(
        load_config(base | {"objective": "dpo"}), adapter_paths=[str(adapter)], scales=(part,),
        split="valid", measure_kl=False, say=say,
    )  # fmt: skip
    (report,) = judged.adapters.values()
    return [gains(pair) for pair in report.pairs]


def answered(
    o: argparse.Namespace, base: dict[str, Any], adapter: Path | None, part: float, seed: int
) -> dict[str, Any]:
    """The share of each prompt's sampled answers that show the behaviour; noise by the seed.

    The answers stay in the work folder, to be read; what they are like is told beside the rates.
    """
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.judge.sampling import distinct_n, sample_all
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
    settings = Sampling(TOKENS[o.behaviour], 1.0, seed)
    drawn = sample_all(model, asked, settings, tokenizer.eos_token_ids, rows=ROWS)
    answers = {(i, j): answer for i, j, answer in drawn}
    seen, kept = np.zeros(len(prompts)), []
    for (i, j), answer in sorted(answers.items()):
        text = tokenizer.decode(answer.tokens.tolist(), skip_special=True)
        seen[i] += shows(text, o.behaviour)
        kept.append({"prompt": prompts[i], "answer": j, "text": text, "logp": answer.logp})
    write_rows(answers_of(o, adapter.name if adapter else BASE, seed, part), kept)
    like = {
        "tokens": float(np.mean([len(one.tokens) for one in answers.values()])),
        "finished": float(np.mean([one.finished for one in answers.values()])),
        "distinct_2": distinct_n([one.tokens for one in answers.values()], 2),
    }
    return {"rates": (seen / each).tolist(), "answers": like}


def answers_of(o: argparse.Namespace, name: str, seed: int, part: float) -> Path:
    return o.work / "answers" / f"{name}-{seed}-{part:.4f}.jsonl"


def read_by_base(base: dict[str, Any], path: Path, point: Mapping[str, Any]) -> dict[str, Any]:
    """What the base makes of two answers to each prompt, nats per token: its own have least."""
    from fpo_mlx.api import open_model
    from fpo_mlx.records import TokenPair

    opened = open_model(base["model"])
    tokenizer, texts = opened.tokenizer, {}
    for row in rows(path):
        if row["answer"] < READ and row["text"]:
            texts.setdefault(row["prompt"], []).append(row["text"])
    nats, tokens = 0.0, 0
    for i, (prompt, two) in enumerate(texts.items()):
        if len(two) < READ:
            continue
        asked = np.array(tokenizer.prompt_tokens([{"role": "user", "content": prompt}]), np.int32)
        sides = [np.array(ids, np.int32) for ids in tokenizer.encode(two)]
        (scores,) = opened.reader.scores([TokenPair(asked, *sides, index=i, where=str(i))])
        nats -= sum(side.logps for side in scores)
        tokens += sum(side.tokens for side in scores)
    same = ("way", "kind", "seed", "level")
    return {**{key: point[key] for key in same}, "base_nats": nats / max(tokens, 1)}


if __name__ == "__main__":
    main()
