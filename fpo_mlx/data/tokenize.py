"""Rows to token pairs: the prompt, each response behind it, and what the length limit costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from fpo_mlx.data import faithful
from fpo_mlx.data.messages import RowFault, ways_on
from fpo_mlx.data.rows import PreferenceRow, Turns
from fpo_mlx.data.variables import Asked, Varied, other_text
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.records import NO_FACTS, TokenPair

BATCH = 256  # rows whose texts are encoded in one call


class Tokenizer(Varied, Protocol):
    """What is needed of a tokenizer; `fpo_mlx.data.tokenizer.ChatTokenizer` is one."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def control_tokens(self) -> tuple[str, ...]: ...
    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, prompt: bool = False
    ) -> str: ...


@dataclass(frozen=True)
class Cut:
    """A response that was longer than the room behind its prompt."""

    where: str
    response: str  # "chosen" or "rejected"
    tokens: int
    kept: int

    def __str__(self) -> str:
        return f"{self.where}: {self.response} cut from {self.tokens} to {self.kept} tokens"


@dataclass(frozen=True)
class Drop:
    """A pair whose prompt leaves no room for a single response token."""

    where: str
    prompt_tokens: int

    def __str__(self) -> str:
        return f"{self.where}: dropped, its prompt alone has {self.prompt_tokens} tokens"


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the rows."""

    rows: int
    pairs: int
    max_seq_length: int
    longest: int  # tokens of the longest prompt + response, before any cut
    cut: tuple[Cut, ...] = ()
    dropped: tuple[Drop, ...] = ()
    same_after_cut: tuple[str, ...] = ()  # where both responses are cut to the same tokens
    weighed: int = 0  # pairs whose row says more of them than their texts

    def lines(self) -> list[str]:
        """Nothing for plain pairs of which nothing was lost; otherwise one line for each kind."""
        lines = []
        if self.weighed:
            lines.append(
                f"{self.weighed} of {self.pairs} pairs bring an agreement, a weight or scores that "
                "their loss heeds"
            )
        if self.cut:
            pairs = len({cut.where for cut in self.cut})
            lines.append(
                f"{len(self.cut)} responses of {pairs} pairs are cut at {self.max_seq_length} "
                f"tokens (the longest has {self.longest}); first: {self.cut[0]}"
            )
        if self.dropped:
            lines.append(
                f"{len(self.dropped)} of {self.rows} pairs are dropped: their prompts leave no "
                f"room within {self.max_seq_length} tokens; first: {self.dropped[0]}"
            )
        if self.same_after_cut:
            lines.append(
                f"{len(self.same_after_cut)} pairs teach nothing: cut at {self.max_seq_length} "
                f"tokens, chosen and rejected are the same; first: {self.same_after_cut[0]}"
            )
        return lines


@dataclass(frozen=True)
class TokenizedPairs:
    pairs: list[TokenPair]
    report: TokenizeReport


class PrefixFault(RowFault):
    """The rendered prompt is not how the rendered conversation begins."""

    def __init__(self, what: str, prompt: str, whole: str) -> None:
        super().__init__("prompt not a prefix", what)
        self.prompt, self.whole = prompt, whole


def cut_to(pairs: Sequence[TokenPair], max_seq_length: int) -> TokenizedPairs:
    """Pairs no longer than max_seq_length (prompt + response).

    Too long: the response is cut at the end, at least one token stays; a pair whose prompt leaves
    no room is dropped. Raises DataError when no pair is left.
    """
    check_length(max_seq_length)
    result = truncate_pairs(pairs, max_seq_length)
    if not result.pairs:
        raise DataError(
            f"no pair is left of {len(pairs)}: every prompt alone fills {max_seq_length} tokens. "
            "Raise --max-seq-length, or shorten the prompts.",
            [str(drop) for drop in result.report.dropped],
        )
    return result


@dataclass(frozen=True)
class Tokenized:
    """One row at its full length. notes: (kind, what) of what the template did beyond its text.

    A response is the whole conversation's tokens minus the prompt's, so all that the template adds
    after the answer stays in.
    """

    pair: TokenPair
    notes: tuple[tuple[str, str], ...] = ()


def tokenize_row(row: PreferenceRow, tokenizer: Tokenizer) -> TokenPair:
    """One row at its full length. Raises RowFault (PrefixFault if the template breaks the rule)."""
    (made,) = tokenize_batch([row], tokenizer)
    if isinstance(made, RowFault):
        raise made
    return made.pair


def tokenize_batch(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer
) -> list[Tokenized | RowFault]:
    """Rows at their full length, or why a row has none: their texts are encoded in one call."""
    texts = [_rendered(row, tokenizer) for row in rows]
    good = [part for three in texts if not isinstance(three, RowFault) for part in three]
    try:
        tokens = iter(tokenizer.encode(good))
    except DataError:  # of one row, which is then found alone
        tokens = None
    done: list[Tokenized | RowFault] = []
    for row, three in zip(rows, texts, strict=True):
        if isinstance(three, RowFault):
            done.append(three)
            continue
        try:
            ids = [next(tokens) for _ in three] if tokens else tokenizer.encode(three)
            done.append(_tokenized(row, three, ids))
        except RowFault as fault:
            done.append(fault)
        except DataError as error:
            done.append(RowFault("beyond vocabulary", str(error)))
    return done


def _rendered(row: PreferenceRow, tokenizer: Tokenizer) -> tuple[str, str, str] | RowFault:
    """The texts of the prompt and of both conversations."""
    texts = partial(_texts, row, row.prompt)
    if row.variables and (fault := other_text(row.variables, tokenizer, texts)):
        return fault
    try:
        return texts(tokenizer)
    except DataError as error:
        return RowFault("template", f"{error}{_without_system(row, tokenizer)}")


def _texts(row: PreferenceRow, prompt: Turns, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Raises DataError."""
    return (
        tokenizer.render(prompt, row.tools, prompt=True),
        tokenizer.render((*prompt, *row.chosen), row.tools),
        tokenizer.render((*prompt, *row.rejected), row.tools),
    )


def _without_system(row: PreferenceRow, tokenizer: Tokenizer) -> str:
    """What helps a row that the template (such as Gemma 2's) refuses for its system message."""
    first = row.prompt[0]["role"]
    if first not in ("system", "developer"):
        return ""
    try:
        _texts(row, row.prompt[1:], tokenizer)
    except DataError:
        return ""
    return (
        f"; without its {first} message the row is taken: put those words before the user's first"
    )


def _tokenized(row: PreferenceRow, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tokenized:
    """Raises RowFault."""
    prompt, *wholes = ids
    names = ("chosen", "rejected")
    responses = [
        _response(name, (texts[0], text), prompt, whole)
        for name, text, whole in zip(names, texts[1:], wholes, strict=True)
    ]
    if not prompt:
        raise RowFault("template", "the chat template makes nothing of the prompt")
    if responses[0] == responses[1]:
        raise RowFault("same response", "chosen and rejected are the same tokens")
    notes = _faithful(row, texts)
    arrays = (np.array(tokens, dtype=np.int32) for tokens in (prompt, *responses))
    pair = TokenPair(*arrays, index=row.index, where=row.where, facts=row.facts)
    return Tokenized(pair, notes)


def _faithful(row: PreferenceRow, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What is to be said of the template's texts. Raises RowFault where an answer lacks a part."""
    notes = []
    lost = faithful.lost_of_prompt(row.prompt, row.tools, texts[0])
    if lost is not None:
        notes.append(("prompt part dropped", f"the chat template leaves out {lost}"))
    for name, text in zip(("chosen", "rejected"), texts[1:], strict=True):
        (turn,), response = getattr(row, name), text[len(texts[0]) :]
        lost = faithful.lost_of_answer(turn, response)
        if lost is not None:
            raise RowFault(
                "answer part dropped",
                f"{name}: the chat template leaves out {lost}, so the model would learn an answer "
                "without it. Take it out of the row, or give a template that writes it "
                "(--chat-template FILE)",
            )
        added = faithful.added_before(turn, response)
        if added is not None:
            notes.append(
                (
                    "added text",
                    f"{name}: the chat template writes {_brief(added)} before the answer, and it "
                    "is scored with it (a variable of the template may put it into the prompt: "
                    "--chat-template-args '{\"enable_thinking\": false}')",
                )
            )
    return tuple(notes)


def _brief(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else f"{text[: most - 1]}…")


def truncate_pairs(pairs: Iterable[TokenPair], max_seq_length: int) -> TokenizedPairs:
    """The length rule of `cut_to`; it may leave no pair."""
    kept: list[TokenPair] = []
    cut: list[Cut] = []
    dropped: list[Drop] = []
    same: list[str] = []
    rows = longest = 0
    for pair in pairs:
        rows += 1
        longest = max(longest, len(pair.prompt) + max(map(len, pair.responses)))
        room = max_seq_length - len(pair.prompt)
        if room < 1:
            dropped.append(Drop(pair.where, len(pair.prompt)))
            continue
        for name, response in zip(("chosen", "rejected"), pair.responses, strict=True):
            if len(response) > room:
                cut.append(Cut(pair.where, name, len(response), room))
        chosen, rejected = (response[:room] for response in pair.responses)
        if np.array_equal(chosen, rejected):
            same.append(pair.where)
        kept.append(replace(pair, chosen=chosen, rejected=rejected))
    weighed = sum(pair.facts != NO_FACTS for pair in kept)
    report = TokenizeReport(
        rows, len(kept), max_seq_length, longest, tuple(cut), tuple(dropped), tuple(same), weighed
    )
    return TokenizedPairs(kept, report)


def data_fingerprint(pairs: Iterable[TokenPair]) -> str:
    """sha256 over the tokens of all pairs and what their rows say of them, in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for key in pair.keys:
            digest.update(key)
        if pair.facts != NO_FACTS:
            digest.update(np.array(astuple(pair.facts), "<f8").tobytes())
    return digest.hexdigest()


def pair_lengths(pairs: Sequence[TokenPair]) -> np.ndarray:
    """Distinct tokens of each pair, what a step costs: [N] int64, what `batches` groups by."""
    return np.array([pair.tokens for pair in pairs], dtype=np.int64)


def ends_its_turn(response: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether an end-of-sequence token stands at the end (the template may add a newline)."""
    return any(int(token) in tokenizer.eos_token_ids for token in response[-4:])


def _response(
    name: str, texts: tuple[str, str], prompt: Sequence[int], whole: Sequence[int]
) -> list[int]:
    """The tokens of one response: the whole conversation behind the prompt. Raises RowFault."""
    if list(whole[: len(prompt)]) != list(prompt):
        if texts[1].startswith(texts[0]):
            what = (
                f"the first characters of {name} melt into one token with the end of the prompt; "
                "remove the white space at its beginning"
            )
        else:
            what = f"the rendered prompt is not how the rendered prompt + {name} begins"
        raise PrefixFault(what, *texts)
    if len(whole) == len(prompt):
        raise RowFault("empty field", f"the chat template makes nothing of {name}")
    return list(whole[len(prompt) :])


def refusal(
    source: str, faults: Sequence[tuple[str, DataError]], rows: int, asked: Asked | None = None
) -> DataError:
    """What is said of a source some of whose rows cannot be used: all of them are named.

    asked: what the rows that can be used ask for.
    """
    asked = asked or Asked()
    for _, fault in faults:
        asked.refuse(fault)
    faults = asked.faults(faults)
    if any(isinstance(fault, PrefixFault) for _, fault in faults):
        return gathered(faults, rows)
    ways = ways_on([fault for _, fault in faults])
    if len(faults) < rows:
        ways += (
            ", or let `fpo-mlx check --data DATA --model MODEL --fix OUT`, with both as here, "
            "write the data without them"
        )
    return DataError(
        f"{source}: {len(faults)} of {rows} rows cannot be used. {ways}:",
        [f"{where}: {fault}" for where, fault in faults],
    )


def gathered(faults: Sequence[tuple[str, DataError]], rows: int) -> DataError:
    """One error for all rows; both texts are shown for the first broken prefix."""
    lines = [f"{where}: {fault}" for where, fault in faults]
    message = f"{len(faults)} of {rows} rows cannot be tokenized"
    broken = next((item for item in faults if isinstance(item[1], PrefixFault)), None)
    if broken is None:
        return DataError(f"{message}:", lines)
    where, fault = broken
    assert isinstance(fault, PrefixFault)
    prompt, whole = _around_the_split(fault.prompt, fault.whole)
    return DataError(
        f"{message}. A response is what the chat template writes behind the prompt, so the prompt "
        f"must be how the whole begins. At {where} it is not:\n"
        f"  prompt: {prompt}\n"
        f"  whole:  {whole}\n"
        "Templates that rewrite earlier text (thinking tags, dates) do this: give another with "
        "--chat-template FILE, or mend these rows:",
        lines,
    )


def _around_the_split(prompt: str, whole: str, before: int = 120, after: int = 240) -> list[str]:
    """Both texts, quoted, from a little before the place where they part."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
    start = max(0, at - before)
    shown = []
    for text in (prompt, whole):
        piece = repr(text[start : at + after])
        shown.append(f"{'…' if start else ''}{piece}{'…' if len(text) > at + after else ''}")
    return shown


def check_length(max_seq_length: int) -> None:
    if max_seq_length < 2:
        raise ConfigError(
            f"max_seq_length is {max_seq_length}; a pair needs at least 2 tokens, one of the "
            "prompt and one of the response."
        )
