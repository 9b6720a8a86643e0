"""Peak memory and time of an update with --gradient backward and forward, above the weights.

    python scripts/bench/forward.py --model FOLDER [--prompt 256] [--objective dpo simpo]

One random pair; each kind in the same process, after a pass that settles what is allocated once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from fpo_mlx import machine
from fpo_mlx.config import PRESETS, Objective, TrainConfig
from fpo_mlx.records import TokenPair

machine.set_up()

import mlx.core as mx  # noqa: E402

from fpo_mlx.machine.parallel import Ranks  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.model.policy import Policy  # noqa: E402
from fpo_mlx.train.gradients import GRADIENTS, Ground  # noqa: E402
from fpo_mlx.train.metrics import ScoredPairs  # noqa: E402
from fpo_mlx.train.scoring import Scorer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--responses", type=int, nargs=2, default=(92, 71), help="tokens")
    parser.add_argument("--objective", nargs="+", default=["dpo"], help="presets without an SAE")
    options = parser.parse_args()
    loaded = load_model(options.model)
    n, paths = adapters.adapted_paths(loaded.model, 16, len(loaded.model.layers) - 1, None)
    adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, 8, 20.0, 0.0, paths))
    policy = Policy(loaded.model, loaded.config, [])
    rng, sizes = np.random.default_rng(0), (options.prompt, *options.responses)
    pair = TokenPair(*(rng.integers(5, 4000, size).astype(np.int32) for size in sizes), index=0)
    for name in options.objective:
        scorer = Scorer(policy, [], Objective(**PRESETS[name]))
        data = ScoredPairs([pair], scorer.reader.scores([pair]))
        found = {}
        for kind, gradient in GRADIENTS.items():
            ground = Ground(scorer, data, TrainConfig(gradient=kind), Ranks())
            _, tree = gradient(ground, np.zeros(1, np.int64), 0)
            mx.eval(tree)
            del tree
            mx.clear_cache()
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            started = time.perf_counter()
            _, tree = gradient(ground, np.zeros(1, np.int64), 1)
            mx.eval(tree)
            found[kind] = {
                "peak_mb": round((mx.get_peak_memory() - held) / 1e6, 1),
                "seconds": round(time.perf_counter() - started, 2),
            }
            del tree
        ratio = found["forward"]["peak_mb"] / found["backward"]["peak_mb"]
        print(json.dumps({"objective": name, "tokens": sizes, **found, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
