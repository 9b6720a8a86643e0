"""Answers per second and memory of `pairs generate` beside mlx_lm.batch_generate.

    python scripts/bench/pairs_generate.py --model M --data pairs.jsonl
    python scripts/bench/pairs_generate.py --model M --data pairs.jsonl --prompts 16 --repeats 1

The same prompts, n answers each, the same longest answer, temperature and answers in work at once;
each subject in a process of its own, taking turns. Time is that of the wall and of the processor:
on a machine that does other things only the second compares. Memory is MLX's peak above the
weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx import machine

SUBJECTS = ("ours", "mlx_lm")


def main() -> int:
    o = parse()
    if o.subject:
        print(json.dumps(measure(o)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SUBJECTS}
    for turn in range(o.repeats):
        for name in SUBJECTS if turn % 2 == 0 else SUBJECTS[::-1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--subject", name]
            found[name].append(json.loads(subprocess.check_output(command)))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    table(o, found)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help=".jsonl with a text `prompt`")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(o: argparse.Namespace) -> dict[str, Any]:
    machine.set_up()
    import mlx.core as mx

    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.model.load import load_model

    model, tokenizer = load_model(o.model).model, load_tokenizer(o.model)
    lines = o.data.read_text(encoding="utf-8").splitlines()[: o.prompts]
    prompts = [
        np.array(tokenizer.prompt_tokens([{"role": "user", "content": json.loads(x)["prompt"]}]))
        for x in lines
    ]
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    wall, processor = time.perf_counter(), time.process_time()
    lengths = RUNS[o.subject](o, model, tokenizer, [p.astype(np.int32) for p in prompts])
    seconds = time.perf_counter() - wall
    return {
        "answers": len(lengths), "tokens": sum(lengths), "seconds": seconds,
        "processor": time.process_time() - processor,
        "peak_gb": (mx.get_peak_memory() - weights) / 1e9,
        "prompt_tokens": float(np.mean([len(p) for p in prompts])),
    }  # fmt: skip


def ours(o: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[np.ndarray]) -> list[int]:
    from fpo_mlx.config import Sampling
    from fpo_mlx.judge.sampling import sample_all
    from fpo_mlx.judge.slots import Asked

    asked = [Asked(p, [(0, i, j) for j in range(o.n)]) for i, p in enumerate(prompts)]
    found = sample_all(model, asked, Sampling(o.tokens), tokenizer.eos_token_ids, rows=o.rows)
    return [len(answer.tokens) for _, _, answer in found]


def mlx_lm(
    o: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[np.ndarray]
) -> list[int]:
    from mlx_lm.generate import batch_generate
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_tokenizer

    own = load_tokenizer(o.model, eos_token_ids=list(tokenizer.eos_token_ids))
    done = batch_generate(
        model, own, [p.tolist() for p in prompts for _ in range(o.n)], max_tokens=o.tokens,
        return_token_ids=True, sampler=make_sampler(temp=1.0), completion_batch_size=o.rows,
    )  # fmt: skip
    return [len(ids) for ids in done.token_ids]


RUNS = {"ours": ours, "mlx_lm": mlx_lm}


def table(o: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{o.prompts} prompts, {o.n} answers each, {o.tokens} tokens, {o.rows} in work, medians")
    print("| | answers/s | answers per processor second | tokens per answer | peak GB |")
    print("|---|---|---|---|---|")
    for name, runs in found.items():
        cells = [
            statistics.median(r["answers"] / r["seconds"] for r in runs),
            statistics.median(r["answers"] / r["processor"] for r in runs),
            statistics.median(r["tokens"] / r["answers"] for r in runs),
            statistics.median(r["peak_gb"] for r in runs),
        ]
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    for unit in ("seconds", "processor"):
        ratios = [
            (a["answers"] / a[unit]) / (b["answers"] / b[unit])
            for a, b in zip(found["ours"], found["mlx_lm"], strict=True)
        ]
        print(f"ours over mlx_lm by {unit}: {statistics.median(ratios):.2f} ({ratios})")


if __name__ == "__main__":
    sys.exit(main())
