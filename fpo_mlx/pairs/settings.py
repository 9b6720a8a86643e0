"""The settings of `fpo-mlx pairs` and `fpo-mlx rounds`: every default and check, once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from fpo_mlx import config
from fpo_mlx.config.fields import out_of_bounds, refuse, setting
from fpo_mlx.pairs.records import MOST

MOST_SECONDS = 1e6  # a socket and a pipe cannot be told much more
MOST_GB = 1e6


def _opt(default: Any, help: str, group: str = "answers", **facts: Any) -> Any:
    return setting(default, help, group, first=True, **facts)


@dataclass(frozen=True)
class GenerateConfig:
    """What is answered, by whom and how."""

    model: str = _opt("", "model folder or hub id that answers", path=True)
    adapter_path: str | None = _opt(
        None, "adapter to answer with (default: the base alone)", path=True
    )
    prompts: str = _opt(
        "", "file of prompts: one per line, or rows with a `prompt` (.jsonl, .csv …)", path=True
    )
    n: int = _opt(4, "answers per prompt", least=1, most=MOST - 1)
    max_tokens: int = _opt(256, "longest answer, in tokens", above=0)
    temp: float = _opt(1.0, "temperature of the answers", least=0, below=math.inf)
    seed: int = _opt(0, "seed of the answers", least=0)
    rows: int = _opt(32, "answers in work at once", above=0)
    max_seq_length: int = _opt(2048, "longest prompt + answer, in tokens", above=0)
    score_in_prompt: float | None = _opt(
        None, "score to ask for, after --reward-augmented pairs", below=math.inf
    )
    chat_template: str | None = _opt(
        None, "file with a chat template, in place of the model's", path=True
    )
    chat_template_args: dict = _opt(
        {}, 'variables of the chat template, as JSON: {"enable_thinking": false}'
    )
    trust_remote_code: bool = _opt(False, "let the model folder run its own Python code", "safety")

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        if self.temp == 0 and self.n > 1:
            faults.append(f"--temp 0: all {self.n} answers would be the same; wanted more than 0.")
        refuse(faults)


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and what is compared."""

    judge: str | None = _opt(None, "model folder or hub id that judges", path=True)
    judge_url: str | None = _opt(None, "endpoint that speaks OpenAI's chat API, up to /v1")
    judge_model: str | None = _opt(None, "name of the endpoint's model")
    reward: str | None = _opt(
        None,
        "FILE.py:FUNCTION(prompt, answer), an example's name, or a .json of features data",
        path=True,
    )
    criteria: str | None = _opt(None, "text file that says what a better answer is", path=True)
    compare: Literal["all", "neighbours"] = _opt("all", "pairs of a prompt's answers to compare")
    against_reference: bool = _opt(False, "compare each answer with the person's of its row")
    keep_cut: bool = _opt(False, "judge answers that ended by length, too, as a reward always does")
    key_variable: str = _opt("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    timeout: float = _opt(
        60.0,
        "seconds until a request or a call of the reward is given up",
        above=0,
        most=MOST_SECONDS,
    )
    retries: int = _opt(6, "times that a request is tried again", least=0)
    memory_gb: float = _opt(4.0, "memory that the reward function may use", above=0, most=MOST_GB)
    trust_remote_code: bool = _opt(
        False, "let the judge's folder run its own Python code", "safety"
    )

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        given = [name for name in ("judge", "judge_url", "reward") if getattr(self, name)]
        if len(given) != 1:
            found = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            faults.append(f"wanted one of --judge, --judge-url and --reward, found {found}.")
        if self.judge_url and not self.judge_url.startswith(("http://", "https://")):
            faults.append(f"--judge-url {self.judge_url}: wanted http://… or https://….")
        if self.judge_url and not self.judge_model:
            faults.append("--judge-model is missing: the endpoint has to be told which model.")
        refuse(faults)


@dataclass(frozen=True)
class BuildConfig:
    """Which candidates become pairs."""

    margin: float | None = _opt(
        None, "least difference of score (default: any)", least=0, below=math.inf
    )
    per_prompt: int | None = _opt(None, "pairs per prompt (default: 1; with --margin all)", least=1)
    keep_cut: bool = _opt(False, "keep answers that ended by length")
    near_duplicates: float = _opt(
        0.9, "similarity from which pairs count as the same; 1 for equal", above=0, most=1
    )
    valid_share: float = _opt(0.1, "share of the prompts for validation", least=0)
    test_share: float = _opt(0.0, "share of the prompts for the test", least=0)
    balance_length: bool = _opt(False, "leave out pairs until the longer answer wins half")
    reward_augmented: bool = _opt(False, "two rows per pair, the wanted score in the system text")
    against_reference: bool = _opt(False, "pairs of a person's answer and the model's")
    judge_name: str | None = _opt(None, "of all judges use this one alone")
    seed: int = _opt(0, "seed of the split and of what is left out")
    force: bool = _opt(False, "write fewer than 30 pairs")

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        if self.valid_share + self.test_share >= 1:
            faults.append("--valid-share and --test-share: wanted together below 1.")
        refuse(faults)


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of answer, judge, build, train. The four sections are the settings of each command."""

    model: str = _opt("", "model folder or hub id that is tuned", "model and SAE", path=True)
    prompts: str = _opt("", "file of prompts to learn from", "data", path=True)
    held_out: str = _opt("", "file of prompts that each round is measured on", "data", path=True)
    output: str = _opt("rounds", "folder to write, one folder a round in it", "saving", path=True)
    rounds: int = _opt(3, "most rounds", "schedule", above=0)
    keep_old: int = _opt(0, "pairs of earlier rounds that are mixed in", "data", least=0)
    start: Literal["first", "previous"] = _opt(
        "previous", "model that a round starts from and is held to", "model and SAE"
    )
    max_drift: float | None = _opt(
        None,
        "change of the chosen log-prob, in nats per token, that ends the rounds",
        "safety",
        above=0,
    )
    generate: dict = _opt({}, "settings of `pairs generate`", "answers")
    judge: dict = _opt({}, "settings of `pairs judge`", "answers")
    build: dict = _opt({}, "settings of `pairs build`", "data")
    train: dict = _opt({}, "settings of `train`", "schedule")

    def __post_init__(self) -> None:
        faults = [
            f"{name} is missing in the file of rounds."
            for name in ("model", "prompts", "held_out")
            if not getattr(self, name)
        ]
        faults += out_of_bounds(self, flags=False)
        owned = {
            "generate": {"model", "adapter_path", "prompts"}, "judge": set(), "build": {"seed"},
            "train": {"model", "data", "adapter_path", "init_adapter", "reference", "resume"},
        }  # fmt: skip
        for section, names in owned.items():
            if both := sorted(names & set(getattr(self, section))):
                faults.append(f"{section}: {', '.join(both)} is settled by the rounds themselves.")
        known = {
            "generate": _names(GenerateConfig), "judge": _names(JudgeConfig),
            "build": _names(BuildConfig), "train": {*config.options(), "objective"},
        }  # fmt: skip
        for name in ("chat_template", "chat_template_args"):
            if self.generate.get(name) != self.train.get(name):
                faults.append(
                    f"{name} differs between generate and train: an adapter is to be asked as it "
                    "was trained. Give both the same."
                )
        for section, names in known.items():
            if unknown := sorted(set(map(str, getattr(self, section))) - names):
                faults.append(f"{section}: unknown settings {', '.join(unknown)}.")
        refuse(faults)


def _names(cls: type) -> set[str]:
    return {one.name for one in dataclasses.fields(cls)}
