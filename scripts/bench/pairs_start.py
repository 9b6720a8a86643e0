"""What many candidates cost before the first answer, verdict or pair: seconds and peak memory.

    python scripts/bench/pairs_start.py --work /tmp/start --prompts 15000

Makes prompts with 4 answers of some 300 characters each and a tiny model, and runs each command in
a process of its own: `pairs generate` and `pairs judge` until their first line is on disk, begun
anew and gone on with where all but the last prompt are done; `pairs build` to its end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from bench_data import timed

ANSWERS = 4
PAIRS = tuple(combinations(range(ANSWERS), 2))
WORDS = 50  # of an answer


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=15_000)
    parser.add_argument(
        "--without-torch",
        action="store_true",
        help="as where it is not installed: transformers imports it with a tokenizer",
    )
    o = parser.parse_args(words)
    shutil.rmtree(o.work, ignore_errors=True)
    o.work.mkdir(parents=True)
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(o.work, o.prompts))
    maker.start()  # a process of its own: a child's peak is never below its parent's
    maker.join()
    print(f"{o.prompts} prompts, {ANSWERS * o.prompts} candidates")
    ask = ["--model", "model", "--prompts", "prompts.txt", "--max-tokens", "4", "--output"]
    judge = ["--reward", "brevity", "--output"]
    cases = {
        "generate, the first": (["generate", *ask, "new.jsonl"], "new.jsonl"),
        "generate, the last": (["generate", *ask, "most.jsonl"], "most.jsonl"),
        "judge, the first": (["judge", "all.jsonl", *judge, "first.jsonl"], "first.jsonl"),
        "judge, the last": (["judge", "all.jsonl", *judge, "known.jsonl"], "known.jsonl"),
        "build, all of it": (["build", "all.jsonl", "--verdicts", "verdicts.jsonl"], None),
    }
    path = str(ROOT)
    if o.without_torch:
        path = os.pathsep.join([path, str(ROOT / "tests" / "support" / "without_torch")])
    for name, (line, grows) in cases.items():
        seconds, cpu, peak, code = timed(
            ["pairs", *line], o.work / "log", o.work / grows if grows else None,
            cwd=o.work, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        end = "" if code in (0, -signal.SIGKILL) else f"  exit code {code}: {o.work}/log"
        print(f"{name:<20} {seconds:6.1f} s  {cpu:6.1f} s of CPU  {peak / 1e6:5.0f} MB{end}")


def make(work: Path, prompts: int) -> None:
    """A model and all files, `most` and `known` without the last prompt's lines."""
    import tiny_models

    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.pairs.records import prompt_id
    from fpo_mlx.pairs.reward import judge_name

    model = tiny_models.tiny_llama(work / "model", tokenizer=True)
    render, judge = load_tokenizer(model).render, judge_name("brevity")
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(4000)]
    made = {name: [] for name in ("prompts.txt", "all.jsonl", "verdicts.jsonl")}
    for number in range(prompts):
        prompt = f"Question {number} {' '.join(chance.choices(words, k=20))}?"
        id = prompt_id(render([{"role": "user", "content": prompt}], None, prompt=True))
        texts = [" ".join(chance.choices(words, k=WORDS)) for _ in range(ANSWERS)]
        answers = [answer(text) for text in texts]
        said = (verdict(id, a, b, texts, judge) for a, b in PAIRS)
        made["prompts.txt"].append(f"{prompt}\n")
        made["all.jsonl"].append(
            json.dumps({"id": id, "prompt": prompt, "candidates": answers}) + "\n"
        )
        made["verdicts.jsonl"].append("".join(json.dumps(one) + "\n" for one in said))
    made |= {"most.jsonl": made["all.jsonl"][:-1], "known.jsonl": made["verdicts.jsonl"][:-1]}
    for name, lines in made.items():
        (work / name).write_text("".join(lines))


def answer(text: str) -> dict[str, Any]:
    settings = {"logp": -30.1, "seed": 0, "temp": 1.0, "model": "model"}
    return {"text": text, "tokens": len(text.split()), "finish": "stop", **settings}


def verdict(id: str, a: int, b: int, texts: Sequence[str], judge: str) -> dict[str, Any]:
    x, y = -len(texts[a]), -len(texts[b])
    side = "tie" if x == y else "a" if x > y else "b"
    found = {"id": id, "a": a, "b": b, "order": "none", "verdict": side, "p": None, "score_a": x}
    return found | {"score_b": y, "judge": judge, "raw": "", "time": 1.0}


if __name__ == "__main__":
    main()
