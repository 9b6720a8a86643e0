"""Do the techniques that save time and memory change what is learned? One run with, one without.

    python scripts/checks/techniques.py --part on    # as `train` does it
    python scripts/checks/techniques.py --part off   # nothing shared, tiled, sparse or checkpointed
    python scripts/checks/techniques.py              # compares the two curves

`off` is the plainest program for the same loss: every sequence on its own through the whole model,
all logits at once, all features of all tokens, autograd through everything. Both runs see the same
pairs in the same order and update the same adapters with the same optimizer. Data, SAE and model
default to a folder `shared` beside the checkout and to SmolLM2-135M from a wheel.

A JumpReLU feature jumps from 0 to its threshold: one that lies there to the last digit fires in one
program and not in the other, whatever either does right. With --ramps the SAE's features rise from
0 at their thresholds instead, so that what is left between the curves is the programs' difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

from fpo_mlx import pipeline
from fpo_mlx.config import Objective, load_config
from fpo_mlx.core import features as F
from fpo_mlx.core.objectives import PairLosses
from fpo_mlx.demo import smollm2
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.taps import Tap, tap_point
from fpo_mlx.model.trees import blocks_of
from fpo_mlx.records import PairScore, TokenPair
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.convert import write_saelens
from fpo_mlx.train.checkpoint import AdapterFolder
from fpo_mlx.train.events import StepReport
from fpo_mlx.train.metrics import ScoredPairs
from fpo_mlx.train.scoring import FACTS, Measures, Scorer
from fpo_mlx.train.trainer import Trainer

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

SHARED = Path(__file__).resolve().parents[3] / "shared"
LIMIT = 1e-4


class PlainScorer:
    """What `scoring.Scorer` computes for FPO, by the definition and nothing else."""

    def __init__(self, policy: Policy, encoder: F.Encoder, objective: Objective) -> None:
        self.policy, self.encoder, self.objective = policy, encoder, objective
        self._tap = Tap(*tap_point(blocks_of(policy.model)[policy.sites[0].layer], policy.sites[0]))

    def freeze_reference(self, weights: Mapping[str, mx.array] | None = None) -> None:
        """The reference is in the cache."""

    def losses(
        self, pairs: Sequence[TokenPair], refs: Sequence[PairScore], *, grad: bool
    ) -> tuple[PairLosses, Measures]:
        del grad
        o, columns = self.objective, []
        for pair, ref in zip(pairs, refs, strict=True):
            chosen, d_chosen = self._side(pair.prompt, pair.chosen, ref[0])
            rejected, d_rejected = self._side(pair.prompt, pair.rejected, ref[1])
            lengths = len(pair.chosen), len(pair.rejected)
            reward_chosen = o.beta * (chosen - ref[0].logps) / lengths[0]
            reward_rejected = o.beta * (rejected - ref[1].logps) / lengths[1]
            penalty = o.alpha * o.beta * (d_rejected - mx.stop_gradient(d_chosen))
            u = reward_chosen - reward_rejected - penalty
            ref_logps, distances = (ref[0].logps, ref[1].logps), (d_chosen, d_rejected)
            sides = ((chosen, rejected), ref_logps, lengths, distances)
            columns.append((-nn.log_sigmoid(u), u, reward_chosen, reward_rejected, sides))
        losses = PairLosses(*(mx.stack([c[i] for c in columns]) for i in range(4)))
        seen = [[[mx.array(c[4][i][s]) for c in columns] for s in (0, 1)] for i in range(4)]
        logps, refs_, lengths_, found = (mx.stack([mx.stack(s) for s in both]) for both in seen)
        plain = [mx.full((len(pairs),), value) for value in FACTS.values()]
        return losses, Measures(logps, refs_, lengths_, *plain, distances=found)

    def _side(self, prompt: np.ndarray, response: np.ndarray, ref) -> tuple[mx.array, mx.array]:
        """Summed log-prob and D of one response."""
        tokens = mx.array(np.concatenate([prompt, response])[None])
        with self._tap.recording() as seen:
            logits = self.policy.model(tokens[:, :-1])[0]  # [L, V]
        rows = slice(len(prompt) - 1, None)
        logps = logits[rows] - mx.logsumexp(logits[rows], axis=-1, keepdims=True)
        picked = mx.take_along_axis(logps, tokens[0, len(prompt) :, None], axis=-1).sum()
        policy = F.encode(self.encoder, seen[-1][0, rows]).mean(axis=0)  # [F]
        target = mx.array(ref.features[0].to_dense(self.encoder.n_features))
        mask = np.zeros(self.encoder.n_features, dtype=np.float32)
        for side in (np.array(mx.stop_gradient(policy)), np.array(target)):
            top = np.argsort(-side, kind="stable")[: self.objective.top_k]
            mask[top[side[top] != 0]] = 1.0
        return picked, (mx.array(mask) * (policy - target) ** 2).sum() / self.objective.top_k


def main() -> int:
    options = parse()
    if options.part:
        curve = run(options, techniques=options.part == "on")
        path = options.output / f"{options.part}.json"
        path.write_text(json.dumps(curve) + "\n", encoding="utf-8")
        return 0
    on, off = (json.loads((options.output / f"{p}.json").read_text()) for p in ("on", "off"))
    n = min(len(on), len(off))
    gaps = [abs(a - b) for a, b in zip(on[:n], off[:n], strict=True)]
    worst = max(gaps)
    print(f"{n} updates: loss {on[0]:.6f} to {on[n - 1]:.6f}; largest difference {worst:.2e}")
    return int(worst > LIMIT)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["on", "off"])
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--sae", type=Path, default=SHARED / "sae" / "smollm2-135m-instruct-l27-4k-jumprelu"
    )
    parser.add_argument("--ramps", action="store_true", help="max(pre - threshold, 0) as the SAE")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "train.jsonl")
    parser.add_argument("--max-seq-length", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--iters", type=int, help="updates (default: one pass over the data)")
    parser.add_argument("--output", type=Path, default=Path("runs") / "techniques")
    return parser.parse_args()


def run(options: argparse.Namespace, *, techniques: bool) -> list[float]:
    """The loss of every update."""
    options.output.mkdir(parents=True, exist_ok=True)
    sae = ramps(options.sae, options.output / "ramps") if options.ramps else options.sae
    settings = {
        "model": str(options.model or smollm2.fetch(say=say).full),
        "sae": (str(sae),),
        "data": str(options.data),
        "max_seq_length": options.max_seq_length,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "steps_per_report": 1,
        "share_prompt": techniques,
        "grad_checkpoint": techniques,
        "adapter_path": str(options.output / f"adapters-{'on' if techniques else 'off'}"),
        **({"iters": options.iters} if options.iters else {"epochs": 1.0}),
    }
    config = load_config(settings)
    job = pipeline.open_job(config, say=say)
    pairs = pipeline.read_pairs(job, "train", say)
    refs = pipeline.CachedScores(pipeline.reference_of(job, pairs, say), pairs)
    scorer, adapter_config = pipeline.open_policy(job, say=say)
    used: Scorer | PlainScorer = scorer
    if not techniques:
        used = PlainScorer(scorer.policy, scorer.encoders[0], config.objective)
    out = AdapterFolder(Path(config.train.adapter_path), adapter_config)
    trainer = Trainer(used, ScoredPairs(pairs, refs), None, config.train, out)  # type: ignore[arg-type]
    losses: list[float] = []
    with out.writing():
        out.start({})
        for report in trainer.run():
            if isinstance(report, StepReport):
                losses.append(report.loss)
                say(f"{report.iteration}/{trainer.total} loss {report.loss:.6f}")
    return losses


def ramps(place: Path, folder: Path) -> Path:
    """The JumpReLU SAE at `place` as a ReLU SAE with the same active features."""
    if not folder.exists():
        sae = load_sae(place)
        if sae.threshold is None:
            raise SystemExit(f"{place} has no thresholds: --ramps is for JumpReLU SAEs.")
        soft = replace(sae, activation="relu", b_enc=sae.b_enc - sae.threshold, threshold=None)
        write_saelens(soft, folder)
    return folder


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
