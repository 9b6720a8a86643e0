"""What a large set of pairs costs before the first step: seconds and peak memory of each command.

    python scripts/bench/bench_data.py --work /tmp/bench --pairs 60000 --tokenizer MODEL_FOLDER

Makes pairs of random words (the demo's) and a model of one tiny block behind a real tokenizer,
fills the reference cache with made-up scores (the reference pass is not what is measured), and runs
`check`, `plan` and `train --iters 1` cold and warm, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from resident import peak_bytes

HIDDEN = 16


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder, tokenizer's")
    parser.add_argument("--commands", default="check,plan,train")
    parser.add_argument("--runs", type=int, default=2, help="the first is cold")
    args = parser.parse_args(words)
    data, model = args.work / "pairs.jsonl", args.work / "model"
    if not data.exists():
        make_pairs(data, args.pairs)
    if not model.exists():
        make_model(model, args.tokenizer)
    os.environ["FPO_MLX_CACHE"] = str(args.work / "cache")
    shutil.rmtree(args.work / "cache", ignore_errors=True)
    print(f"{args.pairs} pairs, {data.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
    for command in args.commands.split(","):
        shutil.rmtree(args.work / "cache" / "tokens", ignore_errors=True)
        for run in range(args.runs):
            if command == "train":
                shutil.rmtree(args.work / "adapters", ignore_errors=True)
                if run == 0:
                    made_up_reference(data, model)
                    shutil.rmtree(args.work / "cache" / "tokens", ignore_errors=True)
            seconds, cpu, peak, code = measure(command, data, model, args.work)
            kind = "cold" if run == 0 else "warm"
            print(
                f"{command:<8} {kind}  {seconds:7.1f} s  {cpu:7.1f} s of CPU  {peak / 1e6:7.0f} MB"
                f"  rc {code}",
                flush=True,
            )


def make_pairs(path: Path, pairs: int) -> None:
    """About 1,780 bytes per pair: prompts of 20 to 80 words, answers of 20 to 240."""
    import fpo_mlx

    text = (Path(fpo_mlx.__file__).parent / "demo/data/train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    words = " ".join(row[key] for row in rows for key in row if isinstance(row[key], str)).split()
    chance = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(pairs):
            sizes = (("prompt", 20, 80), ("chosen", 20, 240), ("rejected", 20, 240))
            row = {n: " ".join(chance.choices(words, k=chance.randint(a, b))) for n, a, b in sizes}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_model(folder: Path, tokenizer: Path) -> None:
    """One Llama block of width 16 with random weights, behind a real tokenizer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    for file in (*tokenizer.glob("tokenizer*"), *tokenizer.glob("*.jinja")):
        shutil.copy(file, folder)
    vocab = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab,
        "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    chance, block = np.random.default_rng(0), "model.layers.0"
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    shapes |= {f"{block}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
    shapes |= {f"{block}.mlp.{n}_proj.weight": (32, HIDDEN) for n in ("gate", "up")}
    shapes |= {f"{block}.mlp.down_proj.weight": (HIDDEN, 32)}
    weights = {n: chance.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}
    norms = ("model.norm", f"{block}.input_layernorm", f"{block}.post_attention_layernorm")
    weights |= {f"{n}.weight": np.ones(HIDDEN, dtype=np.float32) for n in norms}
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})


def made_up_reference(data: Path, model: Path) -> None:
    """The default reference cache of these pairs, without running a model (in a child: memory)."""
    code = (
        "import sys\n"
        "from fpo_mlx import cache\n"
        "from fpo_mlx.cache.identity import Provenance\n"
        "from fpo_mlx.config import load_config\n"
        "from fpo_mlx.pipeline.job import open_job, read_pairs\n"
        "from fpo_mlx.pipeline.store import default_cache\n"
        "from fpo_mlx.records import ResponseScore\n"
        "say = lambda text: print(text, file=sys.stderr)\n"
        "flags = {'model': sys.argv[2], 'data': sys.argv[1], 'objective': 'dpo'}\n"
        "job = open_job(load_config(flags, None), adapter=None, say=say)\n"
        "pairs = read_pairs(job, 'train', say)\n"
        "one = lambda y: ResponseScore(-10.8 * len(y), len(y))\n"
        "score = lambda group: [tuple(one(y) for y in p.responses) for p in group]\n"
        "made = Provenance('float32', 'mlx')\n"
        "folder = default_cache(job.identity)\n"
        "cache.fill_shared(folder, job.identity, pairs, score, rank=0, world=1, made=made)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(data), str(model)], check=True)


def measure(command: str, data: Path, model: Path, work: Path) -> tuple[float, float, int, int]:
    """(seconds, seconds of processor, bytes of peak resident memory, exit code) of one command."""
    line = [command, "--model", str(model), "--data", str(data)]
    if command != "check":
        line += ["--objective", "dpo"]
    if command == "train":
        line += ["--iters", "1", "--batch-size", "1", "--max-start-gap", "1e9"]
        line += ["--adapter-path", str(work / "adapters")]
    return timed(line, work / f"{command}.log")


def timed(
    words: list[str], log: Path, grows: Path | None = None, **process: Any
) -> tuple[float, float, int, int]:
    """`measure` of fpo-mlx with these words; its output goes to the end of `log`.

    grows: the file that ends it with its next line; None to let it end itself. process: what
    `Popen` is told beside.
    """
    size = grows.stat().st_size if grows and grows.exists() else 0
    with log.open("ab") as out:
        begun = time.perf_counter()
        line = [sys.executable, "-m", "fpo_mlx", *words]
        child = subprocess.Popen(line, stdout=out, stderr=out, **process)
        while True:
            done, status, usage = os.wait4(child.pid, os.WNOHANG if grows else 0)
            if done:
                break
            if grows and grows.exists() and grows.stat().st_size > size:
                child.kill()
                grows = None
            time.sleep(0.01)
        child.returncode = os.waitstatus_to_exitcode(status)  # it was waited for, past its object
    seconds, cpu = time.perf_counter() - begun, usage.ru_utime + usage.ru_stime
    return seconds, cpu, peak_bytes(usage), child.returncode


if __name__ == "__main__":
    main()
