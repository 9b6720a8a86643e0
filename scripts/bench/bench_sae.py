"""SAE training on the same cached activations: ours, SAELens' trainer, sparsify's.

    python scripts/bench/bench_sae.py --model M --data chats.jsonl --work DIR [--threads 2]

Parts with files in --work, so that a stopped run goes on: the activations (acts/train, acts/held),
the rivals' environments (venv-saelens, venv-sparsify), then one JSON per run in results-TOKENS/.
Every run is its own process with the activations in memory: held-out fraction of variance
unexplained (FVU), L0, share of features that no held-out token uses, tokens/s of the training loop
alone, peak resident memory (activations and imports included). The rivals run with their default
learning rates and with better ones for so short a budget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from resident import own_peak_bytes

from fpo_mlx import machine

SHAPE = {"width": 4096, "k": 32}
RUNS = {
    "fpo-mlx": {"lr": 3e-3, "batch": 2048},
    "fpo-mlx lr 5e-3": {"lr": 5e-3, "batch": 4096},
    "saelens default": {"lr": 3e-4, "batch": 4096},
    "saelens lr 3e-3": {"lr": 3e-3, "batch": 1024},
    "sparsify default": {"lr": 1e-2, "batch": 4096, "optimizer": "signum", "aux": 0},
    "sparsify adam 3e-3": {"lr": 3e-3, "batch": 1024, "optimizer": "adam", "aux": 1 / 32},
}
PACKAGES = {"saelens": ["sae-lens"], "sparsify": ["eai-sparsify"]}
HELD_TOKENS, CONTEXT = 16_384, 1024


def cache(args: argparse.Namespace) -> None:
    """Activations of at most args.rows tokens and of held-out documents, once."""
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.model.load import load_model
    from fpo_mlx.records import Site
    from fpo_mlx.saetrain import activations, rows, texts

    acts = args.work / "acts"
    if all((acts / name / rows.STORE_ABOUT).exists() for name in ("held", "train")):
        return
    documents = texts.read_documents(
        args.data, load_tokenizer(args.model), max_length=CONTEXT, limit=args.rows + 2 * HELD_TOKENS
    )
    train, held = texts.split_held_out(documents.items, 0.05, 0, HELD_TOKENS)
    loaded = load_model(args.model)
    reader = activations.open_reader(loaded.model, loaded.config, Site(args.layer))
    reader = replace(reader, limit=activations.norm_limit(reader.rows(train[:40])))

    def parts(items: list[texts.Document]) -> Iterator[np.ndarray]:
        for at in range(0, len(items), 100):
            print(f"activations: {at} of {len(items)} documents", file=sys.stderr)
            yield reader.rows(items[at : at + 100])

    for name, items in (("held", held), ("train", train)):
        rows.write_store(acts / name, parts(items), {"site": str(reader.site)})


def ours(args: argparse.Namespace, settings: dict) -> dict:
    """One run in this process."""
    from fpo_mlx.core.dictionary import Rule
    from fpo_mlx.records import Site
    from fpo_mlx.saetrain import finish, rows, state, trainer

    x = np.load(args.work / "acts" / "train" / rows.STORE_ROWS)
    rule = Rule("topk", SHAPE["k"], (SHAPE["width"],), aux_k=x.shape[1] // 2)
    batch, steps = settings["batch"], args.tokens // settings["batch"]
    sample = x[np.random.default_rng(0).permutation(len(x))[:8192]]
    run = state.fresh(sample, rule, seed=0, centre="geometric_median")
    start = time.perf_counter()
    plan = trainer.Plan(
        steps, batch, batch, settings["lr"], 0, max(steps // 60, 4) * batch, report_every=steps
    )
    last = list(trainer.train(rows.from_array(x), run, rule, plan))[-1]
    seconds = time.perf_counter() - start
    peak = own_peak_bytes() / 1e9
    sae = finish.finished(run, rule, x[:0], site=Site(args.layer), model_name=args.model.name)
    figures = finish.measure(sae, np.load(args.work / "acts" / "held" / rows.STORE_ROWS))
    finish.write(args.only.with_suffix(""), sae, finish.card(sae, figures, {"model": "-"}))
    return {
        "fvu": figures.fvu, "l0": figures.l0, "dead": figures.dead,
        "tokens_per_second": last.tokens / seconds, "peak_memory_gb": peak,
    }  # fmt: skip


def environment(args: argparse.Namespace, name: str) -> Path:
    """The Python of a rival's own environment; built the first time."""
    given = getattr(args, f"{name}_python")
    if given:
        return given
    folder = args.work / f"venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        index = ["--index-url", args.torch_index] if args.torch_index else []
        subprocess.run([*pip, *index, "torch"], check=True)
        subprocess.run([*pip, *PACKAGES[name]], check=True)
        (folder / "ready").touch()
    return python


def one(args: argparse.Namespace, name: str) -> dict:
    """Figures of one run, from its file if it is there."""
    folder = args.work / f"results-{args.tokens}"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{name.replace(' ', '-')}.json"
    if out.exists():
        return json.loads(out.read_text())
    threads = str(args.threads)
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, threads)
    if name.startswith("fpo-mlx"):
        own = ["--model", str(args.model), "--work", str(args.work), "--tokens", str(args.tokens)]
        own += ["--layer", str(args.layer), "--only", str(out), "--runs", name]
        command = [sys.executable, __file__, *own]
    else:
        rival = name.split()[0]
        acts = [str(args.work / "acts" / part / "rows.npy") for part in ("train", "held")]
        settings = json.dumps(SHAPE | RUNS[name] | {"tokens": args.tokens, "threads": args.threads})
        script = str(Path(__file__).with_name("bench_sae_rival.py"))
        command = [str(environment(args, rival)), script, rival, *acts, str(out), settings]
        env |= {"SPARSIFY_DISABLE_TRITON": "1"}
    subprocess.run(command, check=True, env=env, stdout=sys.stderr)
    return json.loads(out.read_text())


def main() -> None:
    machine.set_up()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", help="chats as .jsonl; only for the activations")
    parser.add_argument("--work", type=Path, required=True, help="folder of all parts")
    parser.add_argument("--layer", type=int, default=27)
    parser.add_argument("--rows", type=int, default=260_000, help="activations to train on")
    parser.add_argument("--tokens", type=int, default=1_040_000, help="budget: rows times passes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--torch-index", default="https://download.pytorch.org/whl/cpu")
    parser.add_argument("--saelens-python", type=Path, help="an environment that has SAELens")
    parser.add_argument("--sparsify-python", type=Path, help="an environment that has sparsify")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.only.write_text(json.dumps(ours(args, RUNS[args.runs[0]])))
        return
    cache(args)
    print(f"{'':<24} {'FVU':>7} {'L0':>6} {'dead':>6} {'tok/s':>8} {'peak GB':>8}")
    for name in args.runs:
        r = one(args, name)
        print(
            f"{name:<24} {r['fvu']:7.4f} {r['l0']:6.2f} {r['dead']:6.3f} "
            f"{r['tokens_per_second']:8.0f} {r['peak_memory_gb']:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
