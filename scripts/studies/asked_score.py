"""Do answers follow the score that is asked for, after `pairs build --reward-augmented`?

    python scripts/studies/asked_score.py --model M                all three seeds; again to go on
    python scripts/studies/asked_score.py --model M --minutes 60   begin no step later

The base answers 400 prompts four times; VADER's sentiment scores them; pairs that are far apart
become two rows each, with the wanted score in the system text. DPO learns them in large updates.
Then base and tuned model are asked for a high and a low score on 128 prompts about other things.

Everything lies in --work; results/asked-score.json and .md are written anew after each step.
Intervals: 95 % bootstrap over the held-out prompts, all seeds' answers to a prompt together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frontier_rewards import held_out_prompts, training_prompts
from pairs_end_to_end import (
    REWARD,
    TOKENS,
    about,
    answer,
    compare,
    fit,
    markdown,
    of_answers,
    of_seed_text,
    prompts,
)
from texts import ROOT, Steps, in_time, say

from fpo_mlx import machine
from fpo_mlx.storage import files

HELD_N = 2  # answers to a held-out prompt
HIGH, LOW = 0.9, -0.5  # scores that are asked for
BUILD = {"margin": 0.9, "per_prompt": 2, "valid_share": 0.0, "keep_cut": True, "force": True}
TRAIN = {
    "objective": "dpo", "batch_size": 32, "micro_batch_size": 2, "epochs": 0.8,
    "learning_rate": 3e-4, "max_logp_drop": 1e9, "steps_per_report": 1,
}  # fmt: skip
RESULTS = ROOT / "scripts" / "studies" / "results" / "asked-score"
WAYS = {"high": HIGH, "low": LOW}


def main(words: Sequence[str] | None = None) -> int:
    o = parse(words)
    machine.set_up()
    seeds = [int(seed) for seed in o.seeds.split(",")]
    settings = ("model", "prompts", "held_out", "epochs", "rate")
    fixed = {"train": str(TRAIN), "build": str(BUILD)}
    steps = Steps(o.work, {name: str(getattr(o, name)) for name in settings} | fixed)
    found: dict[str, dict[int, dict[str, Any]]] = {"tuned": {}, "base": {}}
    every = [(who, seed) for who in found for seed in seeds]
    for who, seed in in_time(o.minutes, every, of_seed_text):
        found[who][seed] = steps(f"{who}-{seed}", lambda w=who, s=seed: asked(o, w, s))
        write(o, found)
    print(o.output.with_suffix(".md").read_text())
    return 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, default=ROOT / "asked-score")
    parser.add_argument("--output", type=Path, help="results, without a suffix", default=RESULTS)
    parser.add_argument("--seeds", default="0,1,2", help="of training and of the answers after it")
    parser.add_argument("--prompts", type=int, default=400, help="training prompts")
    parser.add_argument("--held-out", type=int, default=128, help="held-out ones")
    parser.add_argument("--epochs", type=float, default=TRAIN["epochs"])
    parser.add_argument("--rate", type=float, default=TRAIN["learning_rate"])
    parser.add_argument("--minutes", type=float, help="begin no step after so many")
    return parser.parse_args(words)


def asked(o: argparse.Namespace, who: str, seed: int) -> dict[str, Any]:
    """Mean reward per held-out prompt, asked for each score."""
    adapter = None if who == "base" else tune(o, seed)
    return {way: ask(o, who, adapter, seed, way) for way in WAYS}


def pairs(o: argparse.Namespace) -> Path:
    """The base's answers in rows that ask for a score; what is there is not made again."""
    from fpo_mlx import pipeline
    from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig

    made, verdicts = o.work / "pairs", o.work / "verdicts.jsonl"
    if not made.is_dir():
        source = prompts(o.work / "prompts.txt", training_prompts()[: o.prompts])
        candidates = o.work / "candidates.jsonl"
        answer(o, candidates, source, None, seed=1)
        judge = JudgeConfig(reward=REWARD)
        pipeline.pairs_judge(judge, candidates=candidates, output=verdicts, say=say)
        pipeline.pairs_build(
            BuildConfig(reward_augmented=True, **BUILD),
            candidates=candidates, verdicts=[verdicts], output=made, say=say,
        )  # fmt: skip
    return made


def tune(o: argparse.Namespace, seed: int) -> Path:
    adapter = o.work / f"adapters-{seed}"
    settings = TRAIN | {"model": str(o.model), "seed": seed, "sae": ()}
    settings |= {"learning_rate": o.rate, "epochs": o.epochs}
    fit(settings, pairs(o), adapter, o.work / "reference", show=lambda event: say(str(event)))
    return adapter


def ask(
    o: argparse.Namespace, who: str, adapter: Path | None, seed: int, way: str
) -> dict[str, Any]:
    texts = held_out_prompts()[: o.held_out]
    out = o.work / f"{who}-{seed}-asked-{way}.jsonl"
    source = prompts(o.work / "held-out.txt", texts)
    answer(o, out, source, adapter, seed, WAYS[way], HELD_N)
    return of_answers(out, texts)


def write(o: argparse.Namespace, found: dict[str, dict[int, dict[str, Any]]]) -> None:
    rows = [
        compare(f"{who} asked for {HIGH} against {LOW}", of_seeds, "low", "high")
        for who, of_seeds in found.items()
        if of_seeds
    ]
    made = about(o.work / "pairs")["pairs"]
    head = (
        f"# Asked for a score\n\n`python scripts/studies/asked_score.py --model "
        f"{Path(o.model).name}`: {made} pairs, scores at least {BUILD['margin']} apart, in two "
        f"rows each; DPO at {o.rate:g}, {o.epochs:g} of an epoch, {TRAIN['batch_size']} rows an "
        "update; "
        f"{o.held_out} held-out prompts with {HELD_N} answers of {TOKENS} tokens, sentiment by "
        "VADER.\n\n"
    )
    o.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(o.output.with_suffix(".json"), {"summary": rows, "answers": found})
    files.write_text(o.output.with_suffix(".md"), head + markdown([row for row in rows if row]))


if __name__ == "__main__":
    sys.exit(main())
