"""`fpo-mlx demo`: the whole way on a small real model, with nothing but the package registry.

SmolLM2-135M-Instruct, an SAE for it and preference pairs come with the package or from PyPI.
The pairs prefer short, direct answers over padded ones.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx import __version__, pipeline
from fpo_mlx.config import RunConfig, Sampling, load_config
from fpo_mlx.demo import smollm2
from fpo_mlx.errors import FpoError
from fpo_mlx.storage import files, outputs

HERE = Path(__file__).parent
DATA, SAE = HERE / "data", HERE / "sae"
TRAIN_PAIRS = 80  # of the 226, so that the demo ends within minutes on two cores
SETTINGS = {
    "batch_size": 1,
    "epochs": 1.0,
    "learning_rate": 5e-5,
    "feature_scale": "raw",  # measured: "reference" collapses at this learning rate
    "steps_per_report": 20,
    "steps_per_eval": 10_000,
    "val_batches": 1,
    "save_every": 10_000,
}
MARK = "demo.json"  # written first: what lies in its folder is the demo's
MADE = outputs.Made(
    "an older demo",
    r"(data|reference|adapters|fused)/|report\.html|results\.txt|demo\.json",
    mark=MARK,
)
QUESTION = "Why do cats purr?"
ANSWER = Sampling(max_tokens=96, temp=0.0)

# The parts in their order, with the share of the whole time that each took on two cores.
PARTS = {
    "model": ("fetch SmolLM2-135M-Instruct", 0.01),
    "reference": ("score the pairs with the model as it is", 0.34),
    "train": ("train the adapters", 0.48),
    "judge": ("judge them on pairs that they were not trained on", 0.11),
    "fuse": ("fuse them into the model", 0.01),
    "answer": ("answer a question before and after", 0.03),
    "report": ("write the report", 0.02),
}


@dataclass(frozen=True)
class Figure:
    """One number of the end, as it is shown, and what it means."""

    value: str
    meaning: str


@dataclass(frozen=True)
class DemoReport:
    """What the demo did; figures on the held-out pairs."""

    first_loss: float
    policy_accuracy_before: float  # share of pairs whose chosen answer is the likelier one
    summary: Mapping[str, Any]  # of `evaluate`
    before: str  # the answer to QUESTION
    after: str
    model: Path
    adapters: Path
    fused: Path
    page: Path  # the report
    table: Path  # every figure, and the answers in full
    seconds: Mapping[str, float]

    def figures(self) -> list[Figure]:
        """The five that matter, best read together: a high accuracy alone proves nothing."""
        s = self.summary
        likelier = f"{self.policy_accuracy_before:.2f} > {s['policy_accuracy']:.2f}"
        drift = f"{s['features/chosen']:.2f}, {s['features/rejected']:.2f}"
        return [
            Figure(likelier, "pairs whose better answer is the likelier one, before > after"),
            Figure(f"{s['rewards/accuracies']:.2f}", "pairs whose better answer gained more"),
            Figure(
                f"{s['logps_per_token/chosen_change']:+.2f}",
                "nats per token won by better answers; far below 0: unlearned",
            ),
            Figure(drift, "D, how far the SAE's features moved: better, worse answers"),
            Figure(f"{self.first_loss:.4f}", "the loss at the start: ln 2, nothing had moved yet"),
        ]


def run(
    *,
    workdir: Path,
    say: Callable[[str], None],
    show: Callable[[Any], None] = lambda _: None,
    progress: Callable[[float], None] = lambda _: None,
    train_pairs: int = TRAIN_PAIRS,
    wheel: Path | None = None,
    overwrite: bool = False,
) -> DemoReport:
    """Fetch, score, train, judge, fuse, answer a question before and after, write the report.

    show: gets the trainer's reports; progress: the share of the whole way that is done, 0 to 1;
    wheel: of the model, in place of a download.
    Raises: ConfigError for a folder with other things in it, or an older demo without `overwrite`;
    FpoError when a part cannot be had.
    """
    workdir = outputs.claim_folder(workdir, "--output", MADE, overwrite=overwrite)
    files.write_json(workdir / MARK, {"fpo-mlx": __version__})
    way = _Way(say, progress)
    with way.part("model"):
        model = smollm2.fetch(wheel, say=say).full
    adapters, fused = workdir / "adapters", workdir / "fused"
    config = _config(workdir, model, train_pairs, overwrite)
    with way.part("reference") as done:
        pipeline.precompute(
            config, output=workdir / "reference", say=say,
            progress=lambda report: done(report.pairs, report.total_pairs),
        )  # fmt: skip
    with way.part("train") as done:
        first = _train(config, say, show, done)
    with way.part("judge"):
        judged = pipeline.evaluate_all(
            config, adapter_paths=[str(adapters)], split="valid", measure_kl=False, say=say
        )
        files.write_text(adapters / "evaluate.json", files.json_text(judged.as_dict()))
    with way.part("fuse"):
        pipeline.fuse(
            config, adapter_path=str(adapters), save_path=fused, overwrite=overwrite, say=say
        )  # fmt: skip
    with way.part("answer"):
        before, after = (answer(folder, QUESTION) for folder in (model, fused))
        names = {"base": (before,), str(adapters): (after,)}
        compared = pipeline.Comparison((QUESTION,), names, ANSWER)
        files.write_text(adapters / "compare.json", files.json_text(compared.as_dict()))
    with way.part("report"):
        page = pipeline.report([adapters], workdir / "report.html")
    (result,) = judged.adapters.values()
    return DemoReport(
        first, _accuracy_before(result.pairs), result.summary, before, after, model, adapters,
        fused, page, workdir / "results.txt", way.seconds,
    )  # fmt: skip


def _config(workdir: Path, model: Path, train_pairs: int, overwrite: bool) -> RunConfig:
    return load_config(
        SETTINGS
        | {"model": str(model), "sae": (str(SAE),)}
        | {"data": str(_write_data(workdir / "data", train_pairs))}
        | {"adapter_path": str(workdir / "adapters"), "reference": str(workdir / "reference")}
        | {"overwrite": overwrite}
    )


def _train(
    config: RunConfig,
    say: Callable[[str], None],
    show: Callable[[Any], None],
    done: Callable[[int, int], None],
) -> float:
    """The loss before the first update, where policy and reference are the same."""
    first, total = None, 1

    def begin(iterations: int) -> None:
        nonlocal total
        total = iterations

    for report in pipeline.train(config, say=say, begin=begin):
        show(report)
        done(report.iteration, total)
        loss = getattr(report, "loss", None)
        first = loss if first is None else first
    if first is None:
        raise FpoError("demo: training reported no loss. Run it again in an empty --output.")
    return first


def _write_data(folder: Path, train_pairs: int) -> Path:
    """The first pairs of the training set and all held-out ones, where a user can look at them."""
    with open(DATA / "train.jsonl", encoding="utf-8") as lines:
        files.write_text(folder / "train.jsonl", "".join(itertools.islice(lines, train_pairs)))
    files.write_bytes(folder / "valid.jsonl", (DATA / "valid.jsonl").read_bytes())
    return folder


def _accuracy_before(pairs: Sequence[Any]) -> float:
    """From the reference's own log-probs: the base prefers the likelier answer, per token."""
    chosen, rejected = (
        [pair[side]["ref_logp"] / pair[side]["tokens"] for pair in pairs]
        for side in ("chosen", "rejected")
    )
    return sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(pairs)


def answer(folder: Path, question: str) -> str:
    """The likeliest answer through plain mlx-lm, as any user of the folder gets it."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))[:2]
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, prompt=prompt, max_tokens=ANSWER.max_tokens).strip()


class _Way:
    """Names each part as it begins, keeps its seconds, and says how much of the whole is done."""

    def __init__(self, say: Callable[[str], None], progress: Callable[[float], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._progress, self._before = say, progress, 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Gives what the part calls with (done, to do)."""
        title, share = PARTS[name]
        self._say(f"[{len(self.seconds) + 1}/{len(PARTS)}] {title}")
        start = time.perf_counter()
        yield lambda done, total: self._progress(self._before + share * done / max(total, 1))
        self.seconds[name] = time.perf_counter() - start
        self._before += share
        self._progress(self._before)
