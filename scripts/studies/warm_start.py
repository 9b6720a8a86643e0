"""How many tokens does an SAE save that is started from another one?

    python scripts/studies/warm_start.py --init SAE [--model M] [--data D] [--seeds 3]

Trains SAEs on one model and site with several budgets of tokens, from random weights (cold) and
from --init (warm), each a whole schedule of its own, and keeps FVU, L0 and dead features on text
that no cell was trained on; of --init as it is, too. Without --init an SAE is trained first, on the
block before (--start-layer), with --start-tokens; or give --init an SAE of one block and --layer
another: a near place stands in for a near model. A budget's activations are computed once: seeds
draw the first weights and the order, not the text. Each cell is kept in --work, so a stopped run
goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from texts import ROOT, Steps, goes_on, rows, say, settings_of, shared, write_rows

from fpo_mlx import machine, pipeline, read_sae
from fpo_mlx.config import SaeTrainConfig
from fpo_mlx.demo import smollm2
from fpo_mlx.records import SaeWeights
from fpo_mlx.storage import files

FIGURES = ("fvu", "l0", "dead")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=shared("data") / "chats.jsonl")
    parser.add_argument("--judge-on", type=int, default=40, help="documents: the last of --data")
    parser.add_argument("--init", help="SAE to start from")
    parser.add_argument("--layer", type=int, help="default: that of --init, or `sae train`'s")
    parser.add_argument("--architecture", default="topk", choices=("topk", "jumprelu"))
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[50_000, 100_000, 200_000, 500_000, 1_000_000]
    )
    parser.add_argument("--start-layer", type=int, help="of the SAE that is made without --init")
    parser.add_argument("--start-tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "warm-start-work")
    parser.add_argument("--output", type=Path, help="result; default: results/warm_start.json")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    machine.set_up()
    o = parse(words)
    o.model = o.model or smollm2.fetch(say=say).full
    settings = settings_of(o, "tokens")
    steps = Steps(o.work, settings)
    given = rows(o.data)
    o.data = write_rows(o.work / "data.jsonl", given[: -o.judge_on])
    o.held_out = write_rows(o.work / "held_out.jsonl", given[-o.judge_on :])
    if o.init and o.layer is None and (site := read_sae(o.init).site) is not None:
        o.layer = site.layer
    init = o.init or begin(o, steps)
    unchanged = steps(
        "as-it-is", lambda: judged(o, read_sae(init), config_of(o, "as-it-is", 1, None, 0))
    )
    about = settings | {name: Path(settings[name]).name for name in ("model", "data", "init")}
    result: dict[str, Any] = {"settings": about, "as it is": unchanged, "cells": []}
    place = o.output or ROOT / "scripts" / "studies" / "results" / "warm_start.json"
    for seed in range(o.seeds):  # a whole curve of one seed first
        for tokens in o.tokens:
            for kind, start in (("cold", None), ("warm", init)):
                name = f"{kind}-{tokens}-{seed}"
                figures = steps(name, lambda n=name, t=tokens, i=start, s=seed: cell(o, n, t, i, s))
                result["cells"].append({"kind": kind, "tokens": tokens, "seed": seed, **figures})
                result["means"] = means(result["cells"])
                files.write_json(place, result)
    print(json.dumps(result["means"], indent=2))


def begin(o: argparse.Namespace, steps: Steps) -> str:
    """The SAE to start from, where none was given: of a block nearby."""
    from fpo_mlx.saetrain.sizes import sizes
    from fpo_mlx.storage.hub import read_config

    about = read_config(Path(o.model))
    own = sizes(config_of(o, "start", o.start_tokens, None, 0), about, int(about["hidden_size"]))
    layer = own.layer - 1 if o.start_layer is None else o.start_layer
    steps("start", lambda: cell(o, "start", o.start_tokens, None, 1000, layer=layer))
    o.layer = own.layer
    return str(o.work / "start")


def config_of(
    o: argparse.Namespace, name: str, tokens: int, init: str | None, seed: int,
    layer: int | None = None,
) -> SaeTrainConfig:  # fmt: skip
    folder = o.work / name
    return SaeTrainConfig(
        model=str(o.model), data=str(o.data), output=str(folder), layer=o.layer if layer is None
        else layer, architecture=o.architecture, width=o.width, k=o.k, training_tokens=tokens,
        batch_size=o.batch_size, init=init, seed=seed, passes=1000.0, held_out=0.0,
        store=None if name == "start" else str(o.work / f"activations-{tokens}"),
        **goes_on(folder, "checkpoint.safetensors"),
    )  # fmt: skip


def cell(
    o: argparse.Namespace, name: str, tokens: int, init: str | None, seed: int,
    layer: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """One training; its figures on text that no cell was trained on."""
    config = config_of(o, name, tokens, init, seed, layer)
    done = pipeline.sae_train(config, say=say)
    return judged(o, read_sae(done.folder), config) | {"trained": done.tokens}


def judged(o: argparse.Namespace, sae: SaeWeights, config: SaeTrainConfig) -> dict[str, float]:
    from fpo_mlx.saetrain import finish  # it loads MLX: after machine.set_up

    found = finish.measure(sae, held_out_rows(o, config))
    if found is None:
        raise SystemExit("nothing was held out to judge on; give more --data.")
    return {key: getattr(found, key) for key in FIGURES}


def held_out_rows(o: argparse.Namespace, config: SaeTrainConfig) -> np.ndarray:
    """Activations at the cell's site, [n, D]; computed once for a block."""
    from fpo_mlx.machine.parallel import open_ranks
    from fpo_mlx.pipeline import sae_setup

    place = o.work / f"held-out-{config.layer}.npy"
    if not place.is_file():
        own = replace(config, data=str(o.held_out), training_tokens=None, init=None, store=None)
        setup = sae_setup.open_setup(own, open_ranks(), say)
        with files.atomic_path(place) as temporary, temporary.open("wb") as out:
            np.save(out, setup.reader.rows(setup.train))
    return np.load(place)


def means(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds, and the range; a line for each budget and kind, in the order of the cells."""
    found = []
    for kind, tokens in dict.fromkeys((one["kind"], one["tokens"]) for one in cells):
        own = [one for one in cells if (one["kind"], one["tokens"]) == (kind, tokens)]
        fvu = [one["fvu"] for one in own]
        row = {"kind": kind, "tokens": tokens, "seeds": len(own)}
        row |= {name: statistics.fmean(one[name] for one in own) for name in FIGURES}
        found.append(row | {"fvu_range": [min(fvu), max(fvu)]})
    return found


if __name__ == "__main__":
    main()
