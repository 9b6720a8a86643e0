"""What steering and --project-out cost: a training step with and without, `chat` beside mlx-lm.

    python scripts/bench/steering.py [--model FOLDER] [--sae SAE] [--steps 10] [--tokens 64]

Both sides take turns, so that what else the machine does falls on both. Seconds are the
processor's, of all threads (on a GPU give --wall); medians, and the middle half of the ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "studies")]

from texts import shared

from fpo_mlx import machine


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--sae", type=Path, default=shared("sae", "smollm2-135m-instruct-l27-4k-topk")
    )
    parser.add_argument("--steps", type=int, default=10, help="of each side")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--directions", type=int, default=10)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock")
    return parser.parse_args()


def main() -> None:
    machine.set_up()
    o = parse()
    from fpo_mlx.demo import smollm2

    folder = o.model or smollm2.fetch(say=lambda text: print(text, file=sys.stderr)).full
    clock = time.perf_counter if o.wall else time.process_time
    result = {"step": step(o, folder, clock), "chat": chat(o, folder, clock)}
    print(json.dumps(result, indent=2))


def turns(sides: dict[str, Callable[[], Any]], count: int, clock: Callable[[], float]) -> dict:
    """Medians of both, and of the second over the first."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(count + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            start = clock()
            sides[name]()
            if number:  # the first compiles
                seconds[name].append(clock() - start)
    first, second = (np.array(values) for values in seconds.values())
    out: dict[str, Any] = {name: float(np.median(values)) for name, values in seconds.items()}
    low, middle, high = np.percentile(second / first, [25, 50, 75])
    return out | {"ratio": [float(low), float(middle), float(high)]}


def step(o: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict:
    """One pair of 76 + 154/77 tokens under fpo: forward, backward, no optimizer."""
    import mlx.core as mx
    import mlx.nn as nn

    from fpo_mlx.config import Objective
    from fpo_mlx.model import adapters
    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.records import Projection, TokenPair
    from fpo_mlx.sae import load_sae
    from fpo_mlx.train.scoring import Scorer

    sae = load_sae(o.sae, decoder=True)
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = (rng.integers(3, 900, n).astype(np.int32) for n in (76, 154, 77))
    pairs = [TokenPair(prompt, chosen, rejected, index=0)]
    taken = Projection.of(sae.site, sae.w_dec[: o.directions])
    sides = {}
    for name, projections in (("plain", []), ("projected", [taken])):
        loaded = load_model(folder)
        n, keys = adapters.adapted_paths(loaded.model, 16, sae.site.layer, None)
        adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, 8, 20.0, 0.0, keys))
        policy = Policy(loaded.model, loaded.config, [sae.site], projections=projections)
        scorer = Scorer(policy, [encoder_of(sae)], Objective())
        refs = scorer.reader.scores(pairs)

        def update(scorer=scorer, refs=refs) -> None:
            def loss():
                return scorer.losses(pairs, refs, grad=True)[0].losses.mean()

            mx.eval(nn.value_and_grad(scorer.policy.model, loss)())

        sides[name] = update
    return turns(sides, o.steps, clock)


def chat(o: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict:
    """First token, and the rest, of mlx-lm's generator and of ours without steering."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from fpo_mlx.config import Sampling
    from fpo_mlx.judge.speaking import Speaker
    from fpo_mlx.model.load import load_model
    from fpo_mlx.sae import load_sae

    plain, ours = load_model(folder).model, load_model(folder).model
    speaker = Speaker(ours, load_sae(o.sae, decoder=False).site)
    prompt = np.random.default_rng(0).integers(3, 900, 76).astype(np.int32)

    def theirs(count: int) -> Callable[[], Any]:
        return lambda: list(generate_step(mx.array(prompt), plain, max_tokens=count))

    def own(count: int) -> Callable[[], Any]:
        return lambda: list(speaker.speak(prompt, Sampling(count, 0.0), ()))

    return {
        name: turns({"mlx_lm": theirs(count), "chat": own(count)}, o.steps, clock)
        for name, count in (("first token", 1), (f"{o.tokens} tokens", o.tokens))
    }


if __name__ == "__main__":
    main()
