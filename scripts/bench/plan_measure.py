"""One real step in a process of its own: the peak memory that `scripts/bench/plan.py` compares."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX


def measure(model: Path, case: dict[str, Any], steps: int) -> dict[str, float]:
    """Peak and resident bytes, seconds of the fastest of the steps (or reference passes)."""
    import bench_subjects as bs
    import mlx.core as mx
    import numpy as np

    from fpo_mlx.config import PRESETS, Objective
    from fpo_mlx.model import adapters
    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.model.trees import blocks_of
    from fpo_mlx.records import Site
    from fpo_mlx.train.scoring import Scorer

    loaded = load_model(model)
    last = len(blocks_of(loaded.model)) - 1
    site, train = Site(last), case["command"] == "train"
    if train:
        mx.random.seed(0)
        n, keys = adapters.adapted_paths(loaded.model, min(bs.LAYERS, last + 1), last, None)
        adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, bs.RANK, bs.SCALE, 0.0, keys))
    objective = Objective(**PRESETS[case["objective"]])
    sites = [site] if objective.pooled else []
    policy = Policy(
        loaded.model, loaded.config, sites, grad_checkpoint=train and case["grad_checkpoint"]
    )
    prompt, chosen, rejected = case["shape"]
    pairs = [
        bs.make_pair(prompt, chosen, rejected, policy.vocab_size, index=i)
        for i in range(case["micro"])
    ]
    encoders = []
    if objective.pooled:
        world = SimpleNamespace(policy=policy, site=site)
        encoders = [encoder_of(bs.random_sae(world, case["sae"], pairs[0]))]  # type: ignore
    scorer = Scorer(policy, encoders, objective)
    mx.eval([vars(encoder) for encoder in encoders])
    if train:
        refs = [row for pair in pairs for row in scorer.reader.scores([pair])]
        trainer = bs.make_trainer(scorer, pairs, refs, case["micro"])
        everything = np.arange(len(pairs))
        mx.eval(trainer.optimizer.state)

    def run() -> None:
        if not train:
            scorer.reader.scores(pairs[:1])
            return
        trainer.model.train()
        bs.update(trainer, trainer._gradient(everything)[1])

    return _watch(run, steps)


def _watch(run: Callable[[], None], steps: int) -> dict[str, float]:
    import mlx.core as mx

    mx.clear_cache()
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return {"peak": mx.get_peak_memory(), "resident": resident, "seconds": min(seconds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("case", type=json.loads)
    parser.add_argument("--steps", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.case, given.steps)))
