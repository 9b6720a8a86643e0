"""From prompts to a better model with a reward that is known: mean reward before and after.

    python scripts/studies/pairs_end_to_end.py --model M --sae S --work out --seeds 0,1,2
    python scripts/studies/pairs_end_to_end.py --model M --sae S --work out --rounds 2

Per seed: answers to the training prompts, judged by the sentiment of VADER (package
vaderSentiment, Hutto and Gilbert 2014), built into pairs, FPO trained on them; then held-out
prompts answered by the base and by what was tuned, with the same noise. A run that was stopped goes
on where it was. Intervals: 95 % bootstrap over held-out prompts, all answers of a prompt together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx import machine
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
HELD_OUT = 20  # the last of them
TOKENS, N = 40, 4
TRAIN = {"batch_size": 1, "epochs": 2.0, "learning_rate": 5e-5, "feature_scale": "raw"}
QUIET = {"steps_per_eval": 100_000, "val_batches": 0, "save_every": 100_000}


def main() -> int:
    o = parse()
    machine.set_up()
    results = [one for seed in o.seeds.split(",") for one in run(o, int(seed))]
    files.write_json(o.work / "results.json", {"summary": summary(results), "runs": results})
    print(json.dumps(summary(results), indent=2))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--sae", required=True, help="its SAE")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything made")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=len(THINGS) - HELD_OUT)
    return parser.parse_args()


def run(o: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """One record a round."""
    reward = f"{Path(__file__).resolve()}:sentiment"
    place = o.work / f"seed-{seed}"
    train = prompts(place / "train.txt", THINGS[:-HELD_OUT][: o.prompts])
    held_out = prompts(place / "held-out.txt", THINGS[-HELD_OUT:])
    before = held(o, place / "base.jsonl", held_out, None, seed)
    adapter, out = None, []
    for number in range(1, o.rounds + 1):
        folder = place / f"round-{number}"
        answer(o, folder / "candidates.jsonl", train, adapter, seed + 1000 * number)
        built = build(folder, reward, seed)
        adapter = tune(o, folder, adapter, seed)
        after = held(o, folder / "held-out.jsonl", held_out, adapter, seed)
        gain = after.mean(axis=1) - before.mean(axis=1)
        out.append(
            {"seed": seed, "round": number, "pairs": built["pairs"], "before": float(before.mean()),
             "after": float(after.mean()), "gain": float(gain.mean()), "of_prompts": gain.tolist()}
        )  # fmt: skip
        say(f"seed {seed}, round {number}: {out[-1]['before']:.3f} -> {out[-1]['after']:.3f}")
    return out


def prompts(path: Path, things: tuple[str, ...]) -> Path:
    files.write_text(path, "".join(f"Write one sentence about {thing}.\n" for thing in things))
    return path


def answer(o: argparse.Namespace, out: Path, source: Path, adapter: Any, seed: int) -> None:
    from fpo_mlx import pipeline
    from fpo_mlx.pairs.settings import GenerateConfig

    settings = GenerateConfig(
        model=o.model, adapter_path=adapter and str(adapter), prompts=str(source), n=N,
        max_tokens=TOKENS, seed=seed,
    )  # fmt: skip
    pipeline.pairs_generate(settings, output=out, say=say)


def build(folder: Path, reward: str, seed: int) -> dict[str, Any]:
    """Cut answers are kept: with so few tokens nearly all are cut, before and after alike."""
    from fpo_mlx import pipeline
    from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig

    candidates, verdicts = folder / "candidates.jsonl", folder / "verdicts.jsonl"
    about = folder / "pairs" / "pairs.json"
    if not about.exists():
        pipeline.pairs_judge(
            JudgeConfig(reward=reward), candidates=candidates, output=verdicts, say=say
        )
        pipeline.pairs_build(
            BuildConfig(keep_cut=True, valid_share=0.0, seed=seed, force=True),
            candidates=candidates, verdicts=[verdicts], output=folder / "pairs", say=say,
        )  # fmt: skip
    return json.loads(about.read_text())


def tune(o: argparse.Namespace, folder: Path, start: Any, seed: int) -> Path:
    from fpo_mlx import pipeline
    from fpo_mlx.config import load_config

    adapter = folder / "adapters"
    if not (adapter / "adapters.safetensors").exists():
        flags = {"model": o.model, "sae": (o.sae,), "data": str(folder / "pairs"), "seed": seed}
        flags |= {"adapter_path": str(adapter), "reference": str(folder / "reference")}
        flags |= {"init_adapter": str(start)} if start else {}
        flags["overwrite"] = (adapter / "run.json").exists()  # a killed run saved nothing yet
        config = load_config(TRAIN | QUIET | flags)
        pipeline.precompute(config, output=folder / "reference", say=say)
        for _ in pipeline.train(config, say=say):
            pass
    return adapter


def held(o: argparse.Namespace, out: Path, source: Path, adapter: Any, seed: int) -> np.ndarray:
    """Reward of every held-out answer: [prompts, N], prompts in the order of their ids."""
    from fpo_mlx.pairs.records import open_candidates

    answer(o, out, source, adapter, seed)
    found = sorted(open_candidates(out), key=lambda one: one.id)
    return np.array([[sentiment("", c.text) for c in one.candidates] for one in found])


def sentiment(prompt: str, answer: str) -> float:
    """VADER's compound score, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    del prompt
    analyser = _KEPT.setdefault("analyser", SentimentIntensityAnalyzer())
    return float(analyser.polarity_scores(answer)["compound"])


_KEPT: dict[str, Any] = {}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per round: means over seeds, and the gain's interval over held-out prompts."""
    rng, out = np.random.default_rng(0), {}
    for number in sorted({r["round"] for r in results}):
        runs = [r for r in results if r["round"] == number]
        gains = np.array([r["of_prompts"] for r in runs]).mean(axis=0)
        picks = rng.integers(0, len(gains), size=(2000, len(gains)))
        low, high = np.percentile(gains[picks].mean(axis=1), [2.5, 97.5])
        out[f"round {number}"] = {
            "seeds": [r["seed"] for r in runs],
            "before": float(np.mean([r["before"] for r in runs])),
            "after": float(np.mean([r["after"] for r in runs])),
            "gain": float(gains.mean()), "gain/ci95": [float(low), float(high)],
            "gain of each seed": [r["gain"] for r in runs],
        }  # fmt: skip
    return out


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
