"""The pairs of a command: read and tokenized once, and what to say of them before the long part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from fpo_mlx import data
from fpo_mlx.config import RunConfig
from fpo_mlx.data.findings import Kind, by_kind, leakage
from fpo_mlx.data.prepare import Prepared, prepare
from fpo_mlx.data.tokenizer import ChatTokenizer, load_tokenizer
from fpo_mlx.errors import DataError
from fpo_mlx.records import TokenPair
from fpo_mlx.storage import paths

Say = Callable[[str], None]
FIRST_SAID, SAID_AGAIN = 2.0, 10.0  # seconds


class Ticker:
    """Says how far a long count has come: after two seconds, and then every ten."""

    def __init__(self, say: Say, what: str) -> None:
        self._say, self._what = say, what
        self._begun = time.monotonic()
        self._next = self._begun + FIRST_SAID

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SAID_AGAIN
            self._say(f"{self._what}: {done} rows, {now - self._begun:.0f} s")


def read_splits(
    config: RunConfig,
    tokenizer: ChatTokenizer,
    names: Sequence[str],
    say: Say,
    *,
    doctor: bool = False,
) -> dict[str, list[TokenPair]]:
    """Splits as token pairs within --max-seq-length; cuts and drops are said.

    doctor: say, in one block, what `check` would find too.
    """
    if len(names) > 1:  # each is refused before another one is tokenized, which may take long
        for name in names:
            data.find_place(str(config.data.data), name, hub_splits(config))
    splits = {name: _one(config, tokenizer, name, say) for name in names}
    limit = longest(config.data.max_seq_length, tokenizer, say)
    pairs, lines = {}, []
    for name, split in splits.items():
        done = data.cut_to(split.pairs, limit)
        pairs[name] = done.pairs
        lines += [f"{name}: {line}" for line in done.report.lines()]
        lines += _beyond_training(name, done.pairs, tokenizer)
    kinds = _kinds(splits) if doctor else []
    if kinds:
        say(
            "what `fpo-mlx check` finds in these rows (its --json has all of them, its --fix "
            "leaves out what is kept here):"
        )
    for line in [*(f"  {kind.of_run()}" for kind in kinds), *lines]:
        say(line)
    return pairs


def _one(config: RunConfig, tokenizer: ChatTokenizer, name: str, say: Say) -> Prepared:
    return prepare(
        config.data.data, name, tokenizer, columns(config), hub_splits(config),
        store=token_folder(), progress=Ticker(say, f"{name}: tokenized"),
    )  # fmt: skip


def token_folder() -> Path:
    """Where tokenized pairs are kept by content."""
    return paths.cache_root() / "tokens"


def _kinds(splits: dict[str, Prepared]) -> list[Kind]:
    """Of each split, and prompts that stand in two."""
    topics = {
        name: list(zip(split.topics, (pair.where for pair in split.pairs), strict=True))
        for name, split in splits.items()
    }
    return [
        *(kind for split in splits.values() for kind in split.kinds),
        *by_kind(leakage(topics)),
    ]


def _beyond_training(name: str, pairs: Sequence[TokenPair], tokenizer: ChatTokenizer) -> list[str]:
    """A model with rotary positions goes on past what it was trained on, and badly."""
    trained = tokenizer.limits.trained
    if trained is None:
        return []
    lengths = [len(pair.prompt) + max(map(len, pair.responses)) for pair in pairs]
    over = sum(length > trained for length in lengths)
    if not over:
        return []
    return [
        f"{name}: warning: {over} pairs are longer than the {trained} tokens that the model was "
        f"trained on (the longest has {max(lengths)}); --max-seq-length {trained} cuts them"
    ]


def tokenizer_of(
    path: Path, template: str | None, variables: Mapping[str, Any], trust: bool, say: Say
) -> ChatTokenizer:
    """The tokenizer of a model's folder with the chat template of a command's settings.

    variables: of the template; a slip in them changes nothing, and is said.
    """
    tokenizer = load_tokenizer(
        path,
        chat_template=Path(template) if template else None,
        template_kwargs=variables,
        trust_remote_code=trust,
    )
    for note in tokenizer.notes:
        say(note)
    return tokenizer


def longest(max_seq_length: int, tokenizer: ChatTokenizer, say: Say = lambda _: None) -> int:
    """--max-seq-length, or less where the model's table of positions ends before it."""
    positions = tokenizer.limits.positions
    if positions is None or positions >= max_seq_length:
        return max_seq_length
    say(f"the model has {positions} positions: --max-seq-length {max_seq_length} becomes that")
    return positions


def check_room(prompts: Sequence[Any], max_tokens: int, tokenizer: ChatTokenizer) -> None:
    """Raises: DataError where an answer would run past the model's table of positions."""
    positions = tokenizer.limits.positions
    most = max(map(len, prompts), default=0)
    if positions is not None and most + max_tokens > positions:
        raise DataError(
            f"a prompt of {most} tokens and --max-tokens {max_tokens} go past the model's "
            f"{positions} positions. Shorten one of them."
        )


def room_for(prompt: Sized, max_tokens: int, tokenizer: ChatTokenizer) -> int:
    """max_tokens, or what the model's table of positions leaves. Raises: DataError for nothing."""
    check_room([prompt], 1, tokenizer)
    positions = tokenizer.limits.positions
    return max_tokens if positions is None else min(max_tokens, positions - len(prompt))


def columns(config: RunConfig) -> data.Columns:
    d = config.data
    scores = (d.score_chosen_feature, d.score_rejected_feature)
    return data.Columns(
        d.prompt_feature, d.chosen_feature, d.rejected_feature, d.system_feature,
        agreement=d.agreement_feature, weight=d.weight_feature,
        scores=scores if config.objective.score_margin else None,
    )  # fmt: skip


def hub_splits(config: RunConfig) -> data.HubSplits:
    d = config.data
    return data.HubSplits(d.train_split, d.valid_split, d.test_split, d.subset, d.valid_share)
