"""One row after the other: read, tokenized, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from fpo_mlx.data.containers import RawRow
from fpo_mlx.data.findings import Finding
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.oddities import control_token_in, odd_text
from fpo_mlx.data.read import parse_raw
from fpo_mlx.data.rows import Columns, PreferenceRow
from fpo_mlx.data.tokenize import BATCH, Tokenized, Tokenizer, ends_its_turn, tokenize_batch
from fpo_mlx.records import TokenPair

REPEATED = 20  # letters from which on a prompt at the head of both answers is no accident


@dataclass(frozen=True)
class Inspected:
    """row is None for a row that is refused; pair also where there is no tokenizer."""

    raw: RawRow
    row: PreferenceRow | None
    pair: TokenPair | None
    findings: tuple[Finding, ...]
    fault: RowFault | None = None


def inspect(
    rows: Iterable[RawRow], split: str, tokenizer: Tokenizer | None, columns: Columns
) -> Iterator[Inspected]:
    """Every row by itself, in order. Never raises for a bad one."""
    rows = iter(rows)
    control = () if tokenizer is None else tokenizer.control_tokens
    while batch := list(islice(rows, BATCH)):
        read = [_parsed(raw, columns) for raw in batch]
        good = [row for row in read if isinstance(row, PreferenceRow)]
        made = iter(
            tokenize_batch(good, tokenizer) if tokenizer is not None else [None] * len(good)
        )
        for raw, row in zip(batch, read, strict=True):
            result = row if isinstance(row, RowFault) else next(made)
            if isinstance(row, RowFault) or isinstance(result, RowFault):
                assert isinstance(result, RowFault)
                refused = Finding(result.kind, split, raw.where, str(result))
                yield Inspected(raw, None, None, (refused,), result)
                continue
            said = list(_text_findings(row, control))
            if result is not None and tokenizer is not None:
                said += [*result.notes, *_end_findings(result, tokenizer)]
            pair = None if result is None else result.pair
            found = tuple(Finding(kind, split, raw.where, what) for kind, what in said)
            yield Inspected(raw, row, pair, found)


def _parsed(raw: RawRow, columns: Columns) -> PreferenceRow | RowFault:
    try:
        return parse_raw(raw, columns)
    except RowFault as fault:
        return fault


def _text_findings(row: PreferenceRow, control_tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """At most one (kind, what) of each kind for each part of a row."""
    for part in ("prompt", "chosen", "rejected"):
        text = "\n\n".join(turn["content"] for turn in getattr(row, part))
        odd = odd_text(text)
        if odd is not None:
            yield "odd unicode", f"{part} has {odd}"
        token = control_token_in(text, control_tokens)
        if token is not None:
            yield "control token", f"{part} has {token} in its text, which is read as a command"

    yield from _pair_findings(row)


def _pair_findings(row: PreferenceRow) -> Iterator[tuple[str, str]]:
    if row.as_text:
        names = " and ".join(row.as_text)
        yield "messages as text", f"{names}: a list of messages written as a text; read as the list"
    prompt = row.prompt[-1]["content"].strip()
    if len(prompt) >= REPEATED and all(
        answer[0]["content"].lstrip().startswith(prompt) for answer in (row.chosen, row.rejected)
    ):
        yield "prompt repeated", "chosen and rejected both begin with the prompt's own words"
    if row.scores is not None and row.scores[0] <= row.scores[1]:
        how = "lower than" if row.scores[0] < row.scores[1] else "the same as"
        yield (
            "scores disagree",
            f"the score of chosen, {row.scores[0]:g}, is {how} that of rejected, {row.scores[1]:g}",
        )


def _end_findings(made: Tokenized, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    for name, response in zip(("chosen", "rejected"), made.pair.responses, strict=True):
        if not ends_its_turn(response, tokenizer):
            yield (
                "no end of turn",
                f"{name} does not end with an end-of-sequence token; the model will not learn to "
                "stop (look at the chat template, or at eos_token_id in generation_config.json)",
            )
