"""From prompts to a better model with a reward that is known: mean reward before and after.

    python scripts/studies/pairs_end_to_end.py --model M --sae S       all; again to go on
    python scripts/studies/pairs_end_to_end.py --minutes 60            begin no part later
    python scripts/studies/pairs_end_to_end.py --parts one,two         some of it

Answers to training prompts, judged by the sentiment of VADER (package vaderSentiment, Hutto and
Gilbert 2014), built into pairs, FPO trained on them; then prompts on other things answered by the
base and by what was tuned, with the same noise. Parts, each once per seed:

    one      one round
    two      a second round, of the answers of the first round's model
    longer   one round with the updates of two: are new answers worth more than more updates?

Everything lies in --work, results/pairs-end-to-end.json and .md are written anew after each part.
Intervals: 95 % bootstrap over the held-out prompts, all seeds' answers to a prompt together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import intervals
import numpy as np
from texts import ROOT, SAE, Steps, in_time, say

from fpo_mlx import machine
from fpo_mlx.errors import Diverged
from fpo_mlx.records import PAIRS_FILE
from fpo_mlx.storage import files

THINGS = (
    "a rainy morning", "the dentist", "my neighbour's dog", "a long train ride", "cold soup",
    "the first day at school", "an old bicycle", "a crowded beach", "the night shift", "moving",
    "a broken umbrella", "mathematics", "the sea in winter", "a lost key", "waiting in a queue",
    "a new haircut", "homework", "the city park", "an empty fridge", "a used car", "a spider",
    "a village fair", "learning to swim", "a slow computer", "the last bus", "a job interview",
    "growing tomatoes", "a power cut", "the mountains", "a noisy street", "a birthday party",
    "an exam", "the supermarket", "a thunderstorm", "the museum", "a flat tyre", "camping",
    "a goodbye at the station", "washing the dishes", "a hospital visit", "autumn",
    "a parking fine", "the opera", "a cat in the garden", "taxes", "a walk at night",
    "an unread book", "jogging",
    "a football match", "a letter from the bank", "snow", "a small kitchen", "cleaning windows",
    "a wedding", "the dark", "a ferry", "a chess game", "a bad dream", "painting a wall", "bees",
)  # fmt: skip
MORE = (
    "an attic", "a bakery", "the post office", "a hedgehog", "cooking for friends", "a toothache",
    "a rowing boat", "the harvest", "a candle", "an elevator", "ice on the road", "a choir",
    "a garden fence", "the lighthouse", "an umbrella stand", "a hot afternoon", "the newspaper",
    "a stray cat", "a wooden bridge", "hay fever", "a pair of boots", "the last page",
)  # fmt: skip
ALL = THINGS + MORE
FORMS = ("Write one sentence about {}.", "What do you think of {}?")
HELD_OUT = 42  # the last things; they are asked about in the first form
TOKENS, N, HELD_N = 32, 4, 2  # HELD_N: answers to a held-out prompt
TRAIN = {"batch_size": 1, "epochs": 1.5, "learning_rate": 1e-4, "feature_scale": "raw"}
QUIET = {"steps_per_eval": 100_000, "val_batches": 0, "save_every": 100_000}
RESULTS = ROOT / "scripts" / "studies" / "results" / "pairs-end-to-end"
PARTS = ("one", "two", "longer")
STOPPED = "stopped-by-the-guard.txt"
NOISE = 1000  # between the seeds of two rounds
REWARD = f"{Path(__file__).resolve()}:sentiment"


def main(words: Sequence[str] | None = None) -> int:
    o = parse(words)
    machine.set_up()
    settings = ("model", "sae", "prompts", "held_out", "rate")
    steps = Steps(o.work, {name: str(getattr(o, name)) for name in settings})
    records, seeds = [], [int(seed) for seed in o.seeds.split(",")]
    every = [(part, seed) for part in PARTS if part in o.parts for seed in seeds]
    for part, seed in in_time(o.minutes, every, of_seed_text):
        records.append(steps(f"{part}-{seed}", lambda p=part, s=seed: RUN[p](o, s)))
        write(records, o.output, intro(o))
    print(o.output.with_suffix(".md").read_text())
    return 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--sae", default=SAE, help="its SAE")
    parser.add_argument("--work", type=Path, default=ROOT / "pairs-end-to-end")
    parser.add_argument("--output", type=Path, help="results, without a suffix", default=RESULTS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS)
    parser.add_argument("--rate", type=float, default=TRAIN["learning_rate"])
    parser.add_argument("--prompts", type=int, default=60, help="training prompts, of 80")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="held-out ones, of 42")
    parser.add_argument("--minutes", type=float, help="begin no part after so many")
    return parser.parse_args(words)


def one(o: argparse.Namespace, seed: int) -> dict[str, Any]:
    adapter = first_round(o, seed)
    return before_and_after(o, "one", seed, adapter.parent / "pairs", adapter)


def first_round(o: argparse.Namespace, seed: int) -> Path:
    folder = first_answers(o, seed)
    return tune(o, folder, build(folder, "pairs", seed), seed)


def two(o: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The second round starts from the first one's adapter, which is its reference too."""
    start, folder = first_round(o, seed), of_seed(o, seed) / "two"
    answer(o, folder / "candidates.jsonl", training(o), start, seed + NOISE)
    adapter = tune(o, folder, build(folder, "pairs", seed), seed, start=start)
    return before_and_after(o, "two", seed, folder / "pairs", adapter)


def longer(o: argparse.Namespace, seed: int) -> dict[str, Any]:
    folder = first_answers(o, seed)
    pairs = build(folder, "pairs", seed)
    adapter = tune(o, folder, pairs, seed, name="adapters-longer", passes=2)
    return before_and_after(o, "longer", seed, pairs, adapter)


RUN: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {
    "one": one, "two": two, "longer": longer,
}  # fmt: skip


def of_seed_text(thing: tuple[str, int]) -> str:
    return f"{thing[0]}, seed {thing[1]}"


def of_seed(o: argparse.Namespace, seed: int) -> Path:
    return o.work / f"seed-{seed}"


def training(o: argparse.Namespace) -> Path:
    wanted = [form.format(thing) for thing in ALL[:-HELD_OUT] for form in FORMS][: o.prompts]
    return prompts(o.work / "train.txt", wanted)


def prompts(path: Path, texts: Sequence[str]) -> Path:
    files.write_text(path, "".join(f"{text}\n" for text in texts))
    return path


def first_answers(o: argparse.Namespace, seed: int) -> Path:
    """The base's answers to the training prompts; what is there is not made again."""
    folder = of_seed(o, seed) / "one"
    answer(o, folder / "candidates.jsonl", training(o), None, seed)
    return folder


def answer(
    o: argparse.Namespace, out: Path, source: Path, adapter: Path | None, seed: int,
    score: float | None = None, n: int = N,
) -> None:  # fmt: skip
    from fpo_mlx import pipeline
    from fpo_mlx.pairs.settings import GenerateConfig

    settings = GenerateConfig(
        model=str(o.model), adapter_path=adapter and str(adapter), prompts=str(source), n=n,
        max_tokens=TOKENS, seed=seed, score_in_prompt=score,
    )  # fmt: skip
    pipeline.pairs_generate(settings, output=out, say=say)


def build(folder: Path, name: str, seed: int) -> Path:
    """Cut answers are kept: with so few tokens many are cut, before and after alike."""
    from fpo_mlx import pipeline
    from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig

    candidates, verdicts = folder / "candidates.jsonl", folder / "verdicts.jsonl"
    if not (folder / name / PAIRS_FILE).exists():
        reward = JudgeConfig(reward=REWARD)
        pipeline.pairs_judge(reward, candidates=candidates, output=verdicts, say=say)
        pipeline.pairs_build(
            BuildConfig(keep_cut=True, valid_share=0.0, seed=seed, force=True),
            candidates=candidates, verdicts=[verdicts], output=folder / name, say=say,
        )  # fmt: skip
    return folder / name


def about(pairs: Path) -> dict[str, Any]:
    return json.loads((pairs / PAIRS_FILE).read_text())


def tune(
    o: argparse.Namespace, folder: Path, pairs: Path, seed: int, *, start: Path | None = None,
    name: str = "", passes: int = 1,
) -> Path:  # fmt: skip
    """FPO on the pairs; the reference is what answered: the base, or `start`."""
    adapter = folder / (name or f"adapters-{pairs.name}")
    settings = {"model": str(o.model), "sae": (str(o.sae),), "seed": seed}
    settings |= {"init_adapter": str(start)} if start else {}
    settings |= {"learning_rate": o.rate, "epochs": passes * TRAIN["epochs"]}
    try:
        fit(TRAIN | settings, pairs, adapter, folder / f"reference-{pairs.name}")
    except Diverged as stop:  # judged with the adapters from before it, and counted
        if not (adapter / "adapters.safetensors").exists():
            raise
        files.write_text(adapter / STOPPED, f"{stop}\n")
        say(str(stop))
    return adapter


def fit(
    settings: dict[str, Any], pairs: Path, adapter: Path, reference: Path,
    show: Callable[[Any], object] = lambda _: None,
) -> None:  # fmt: skip
    """Score the pairs and train on them; what is there is not made again. Raises: Diverged."""
    from fpo_mlx import pipeline
    from fpo_mlx.config import load_config

    if (adapter / "adapters.safetensors").exists():
        return
    places = {"data": str(pairs), "adapter_path": str(adapter), "reference": str(reference)}
    places["overwrite"] = (adapter / "run.json").exists()  # a killed run saved nothing yet
    config = load_config(QUIET | settings | places)
    pipeline.precompute(config, output=reference, say=say)
    for event in pipeline.train(config, say=say):
        show(event)


def before_and_after(
    o: argparse.Namespace, part: str, seed: int, pairs: Path, adapter: Path
) -> dict[str, Any]:
    place = of_seed(o, seed)
    return {
        "part": part, "seed": seed, "pairs": about(pairs)["pairs"],
        "stopped": (adapter / STOPPED).exists(),
        "before": held(o, place / "base.jsonl", None, seed),
        "after": held(o, place / f"{part}.jsonl", adapter, seed),
    }  # fmt: skip


def held(o: argparse.Namespace, out: Path, adapter: Path | None, seed: int) -> dict[str, Any]:
    """Rewards of the model's answers to the held-out prompts."""
    asked = [FORMS[0].format(thing) for thing in ALL[-HELD_OUT:]][: o.held_out]
    answer(o, out, prompts(o.work / "held-out.txt", asked), adapter, seed, n=HELD_N)
    return of_answers(out, asked)


def of_answers(path: Path, asked: Sequence[str]) -> dict[str, Any]:
    """Per prompt the mean reward of its answers in this file, in the order of the prompts."""
    from fpo_mlx.pairs.records import open_candidates

    found = {one.prompt.text: one.candidates for one in open_candidates(path)}
    answers = [answer for text in asked for answer in found[text]]
    return {
        "reward": [float(np.mean([sentiment(t, c.text) for c in found[t]])) for t in asked],
        "tokens": float(np.mean([c.tokens for c in answers])),
        "cut": float(np.mean([c.finish == "length" for c in answers])),
        "different": len({c.text for c in answers}) / len(answers),
    }


def sentiment(prompt: str, answer: str) -> float:
    """VADER's compound score, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    del prompt
    analyser = _KEPT.setdefault("analyser", SentimentIntensityAnalyzer())
    return float(analyser.polarity_scores(answer)["compound"])


_KEPT: dict[str, Any] = {}


def intro(o: argparse.Namespace) -> str:
    return (
        "# From prompts to a better model\n\n`python scripts/studies/pairs_end_to_end.py --model "
        f"{Path(o.model).name} --sae {Path(o.sae).name}`: {o.prompts} training prompts with {N} "
        f"answers of {TOKENS} tokens, {o.held_out} held-out prompts with {HELD_N}, sentiment by "
        f"VADER, FPO at {o.rate:g}, {TRAIN['epochs']:g} epochs.\n\n"
    )


def write(records: Sequence[dict[str, Any]], to: Path, head: str) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    found = summary(records)
    files.write_json(to.with_suffix(".json"), {"summary": found, "records": list(records)})
    files.write_text(to.with_suffix(".md"), head + markdown(found))


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per comparison: the mean reward of both sides and their difference."""
    by = {part: {r["seed"]: r for r in records if r["part"] == part} for part in PARTS}
    rows = [
        compare(f"{part}: after against before", by[part], "before", "after")
        for part in ("one", "two", "longer")
    ]
    for other in ("one", "longer"):
        both = {s: (by[other][s], by["two"][s]) for s in by["two"] if s in by[other]}
        joined = {
            s: {
                "before": a["after"],
                "after": b["after"],
                "stopped": a.get("stopped") or b.get("stopped"),
            }
            for s, (a, b) in both.items()
        }
        rows.append(compare(f"two against {other}", joined, "before", "after"))
    return [row for row in rows if row]


def compare(
    name: str, of_seeds: dict[int, dict[str, Any]], before: str, after: str
) -> dict[str, Any] | None:
    if not of_seeds:
        return None
    seeds = sorted(of_seeds)
    sides = {
        side: np.array([of_seeds[s][side]["reward"] for s in seeds]) for side in (before, after)
    }
    gap = intervals.gap(sides[after], sides[before])
    row = {
        "what": name, "seeds": seeds, "from": float(sides[before].mean()),
        "to": float(sides[after].mean()), "gain": gap["mean"], "interval": gap["drawn"],
        "t": gap.get("t"), "of seeds": gap["of_seeds"],
    }  # fmt: skip
    row["stopped"] = [s for s in seeds if of_seeds[s].get("stopped")]
    for key in ("tokens", "cut", "different"):
        row[key] = [
            float(np.mean([of_seeds[s][side][key] for s in seeds])) for side in (before, after)
        ]
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| what | seeds | mean reward from | to | difference (95 %) | by t | of each seed |"
        " tokens | different answers | seeds the guard stopped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        by_t = "[{:+.3f}, {:+.3f}]".format(*row["t"]) if row["t"] else ""
        of_seeds = ", ".join(f"{gain:+.3f}" for gain in row["of seeds"])
        lines.append(
            f"| {row['what']} | {len(row['seeds'])} | {row['from']:.3f} | {row['to']:.3f} |"
            f" {row['gain']:+.3f} [{low:+.3f}, {high:+.3f}] | {by_t} | {of_seeds} |"
            f" {row['tokens'][0]:.0f} → {row['tokens'][1]:.0f} |"
            f" {row['different'][0]:.0%} → {row['different'][1]:.0%} |"
            f" {', '.join(map(str, row['stopped'])) or 'none'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
