"""The same prompts answered by the base and by adapters, all in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fpo_mlx import data
from fpo_mlx.config import RunConfig, Sampling
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import ConfigError, DataError, FpoError
from fpo_mlx.pairs.prompts import check_prompts, read_prompts
from fpo_mlx.pairs.records import Prompt
from fpo_mlx.pairs.settings import JudgeConfig
from fpo_mlx.pipeline.evaluate import check_scales
from fpo_mlx.pipeline.job import (
    Say,
    columns,
    hub_splits,
    need_model,
    open_tokenizer,
    warn_of_adapters,
)
from fpo_mlx.pipeline.pairs_judge import check_judge
from fpo_mlx.pipeline.prepared import longest, room_for
from fpo_mlx.pipeline.wins import Wins, wins_by
from fpo_mlx.records import BASE, result_file, shown_name
from fpo_mlx.storage.adapter_files import read_adapter
from fpo_mlx.storage.hub import resolve_model

FIRST = 5  # prompts of a split


@dataclass(frozen=True)
class Comparison:
    """answers: per model, one text a prompt; "base" is the model without (or before) adapters.

    cut: of the same, those that ended at the limit and not by themselves. wins: against the base,
    by `reward`.
    """

    prompts: tuple[str, ...]  # the last user turn of each
    answers: dict[str, tuple[str, ...]]
    sampling: Sampling
    digests: Mapping[str, str | None] = field(default_factory=dict)  # of the adapters' weights
    cut: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    reward: str | None = None
    wins: Mapping[str, Wins] = field(default_factory=dict)

    def told(self, i: int) -> dict[str, str]:
        """What each model answered to one prompt, with a mark where it was cut."""
        mark, cut = f"\n[cut after {self.sampling.max_tokens} tokens]", self._cut(i)
        return {name: t[i] + mark * (name in cut) for name, t in self.answers.items()}

    def _cut(self, i: int) -> list[str]:
        return [name for name, found in self.cut.items() if found[i]]

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {"prompt": prompt, "answers": {name: texts[i] for name, texts in self.answers.items()}}
            | ({"cut": self._cut(i)} if self.cut else {})  # else it is not known
            for i, prompt in enumerate(self.prompts)
        ]
        about = {"sampling": vars(self.sampling), "adapter_sha256": dict(self.digests)}
        if self.reward:
            about |= {"reward": self.reward}
            about |= {"wins": {name: one.as_dict() for name, one in self.wins.items()}}
        return result_file("compare", {**about, "prompts": rows})

    def markdown(self) -> str:
        """One table a prompt, models side by side; what the model wrote cannot break it."""
        lines = []
        for i, prompt in enumerate(self.prompts):
            lines += [f"## {_cell(prompt)}", "", "| " + " | ".join(map(_cell, self.answers)) + " |"]
            lines += ["|" + "---|" * len(self.answers)]
            lines += ["| " + " | ".join(map(_cell, self.told(i).values())) + " |", ""]
        return "\n".join(lines)


def _cell(text: str) -> str:
    for char, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(char, safe)
    return "<br>".join(text.strip().splitlines()) or "(nothing)"


def compare(
    config: RunConfig,
    *,
    adapter_paths: Sequence[str],
    scale: float = 1.0,
    prompts: Sequence[str] = (),
    prompts_file: Path | None = None,
    split: str = "valid",
    count: int | None = None,
    sampling: Sampling,
    judge: JudgeConfig | None = None,
    say: Say,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Answer prompts (given, from a file, or the first of a split) with base and adapters.

    count: of the file or the split; None: all of a file, FIRST of a split.
    scale: part of each adapter's change that is taken (`adapters.fill`); progress: of the answers
    of all, (done, to do). judge: a reward, that says how often an adapter beats the base.
    """
    from fpo_mlx.judge.evaluate import name_of
    from fpo_mlx.model.open import open_model

    if scale != 1.0:
        check_scales(config, adapter_paths, [scale])
    model = need_model(config)
    if judge:
        check_judge(judge)
    given = [Prompt(({"role": "user", "content": text},)) for text in prompts]
    asked = [*given, *(_of_file(prompts_file, count) if prompts_file else ())] or _of_data(
        config, split, count or FIRST
    )
    path = resolve_model(model)
    tokenizer = open_tokenizer(config, path, say)
    tokens = _tokens(asked, tokenizer, longest(config.data.max_seq_length, tokenizer, say))
    sampling = _within(tokens, sampling, tokenizer, say)
    asked_of = {name_of(shown_name(path), scale): path for path in adapter_paths}
    digests = {n: read_adapter(Path(p)).digest for n, p in asked_of.items()}  # before the long part
    warn_of_adapters([config.train.init_adapter, *adapter_paths], config, path, say)
    models = {BASE: config.train.init_adapter, **asked_of}
    opened = (
        (name, open_model(
            path, adapter=adapter, scale=1.0 if name == BASE else scale,
            trust_remote_code=config.reference.trust_remote_code, say=say,
        ).model)
        for name, adapter in models.items()
    )  # fmt: skip
    answers, cut = _answered(opened, len(models), tokens, sampling, tokenizer, progress)
    shown = tuple(prompt.text for prompt in asked)
    wins = _wins(judge, asked, answers, say) if judge else {}
    reward = judge.reward if judge else None
    return Comparison(shown, answers, sampling, digests, cut, reward, wins)


def _answered(
    opened: Iterator[tuple[str, Any]],
    count: int,
    tokens: Sequence[Any],
    sampling: Sampling,
    tokenizer: ChatTokenizer,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[bool, ...]]]:
    """What each of so many models says, and whether it was cut; one in memory at a time."""
    from fpo_mlx.judge.sampling import sample

    answers: dict[str, tuple[str, ...]] = {}
    cut: dict[str, tuple[bool, ...]] = {}
    for name, model in opened:
        found = []
        for answer in sample(model, tokens, sampling, tokenizer.eos_token_ids):
            text = tokenizer.decode(answer.tokens.tolist(), skip_special=True)
            found.append((text, not answer.finished))
            progress(len(answers) * len(tokens) + len(found), count * len(tokens))
        answers[name], cut[name] = zip(*found, strict=True)
        del model  # before the next is opened
    return answers, cut


def _wins(
    judge: JudgeConfig, asked: Sequence[Prompt], answers: Mapping[str, Sequence[str]], say: Say
) -> dict[str, Wins]:
    """A reward that fails costs the wins, and not the answers that took long."""
    try:
        return wins_by(judge, asked, answers, say)
    except FpoError as error:
        say(f"warning: no wins are counted (prompts by number): {error}")
        return {}


def _within(
    tokens: Sequence[Any], sampling: Sampling, tokenizer: ChatTokenizer, say: Say
) -> Sampling:
    """The sampling, no longer than what the longest prompt leaves of the model's positions."""
    room = min((room_for(one, sampling.max_tokens, tokenizer) for one in tokens), default=1)
    if room < sampling.max_tokens:
        say(f"--max-tokens is {room} here: the longest prompt leaves no more positions")
    return replace(sampling, max_tokens=room)


def _tokens(asked: Sequence[Prompt], tokenizer: ChatTokenizer, limit: int) -> list[Any]:
    import numpy as np

    tokens = [
        np.array(tokenizer.prompt_tokens(one.turns, one.tools), dtype=np.int32) for one in asked
    ]
    for prompt, ids in zip(asked, tokens, strict=True):
        if len(ids) >= limit:
            raise DataError(
                f"a prompt has {len(ids)} tokens, which leaves no room below --max-seq-length "
                f"{limit}: {prompt.text[:80]!r}. Shorten it, or raise the limit."
            )
    return tokens


def _of_file(path: Path, count: int | None) -> list[Prompt]:
    """As `pairs generate` reads them, the first `count` or all. Raises: DataError."""
    check_prompts(path)
    return list(read_prompts(path))[:count]


def _of_data(config: RunConfig, split: str, count: int) -> list[Prompt]:
    """The first `count` different prompts of a split."""
    if not config.data.data:
        raise ConfigError(
            "no prompts: give --prompt TEXT (repeatable), --prompts FILE, or --data with --split."
        )
    rows = data.read_split(config.data.data, split, columns(config), hub_splits(config))
    unique = {
        json.dumps([row.prompt, row.tools]): Prompt(tuple(row.prompt), row.tools) for row in rows
    }
    return list(unique.values())[:count]
