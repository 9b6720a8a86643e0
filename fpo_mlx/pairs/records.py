"""Candidates and verdicts: one line of JSON each, what must hold of it, and how it is read.

candidates  {"id", "prompt": text or messages, "tools"?, "candidates": [{"text", "tokens",
            "finish": "stop" | "length", "logp", "seed", "temp", "model"}]}
verdicts    {"id", "a", "b", "order", "verdict", "p", "score_a", "score_b", "judge", "raw", "time",
            "texts"?}
            a and b are numbers of candidates; order says which was shown first ("ab", "ba"), or
            "none" where a judge sees one answer at a time; texts names what the two said, so that
            answers which came in their place are not taken for them. Key: id, a, b, order, judge,
            texts; the last line of a key counts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fpo_mlx.data.layouts import MEDIA, PROMPTS
from fpo_mlx.data.messages import conversation_in, kind, messages
from fpo_mlx.data.rows import RowFault, Turns, parse_row
from fpo_mlx.errors import DataError
from fpo_mlx.storage import lines

HUMAN = "human"  # the model of a candidate that came with the prompts
PERSON = "person"  # the judge of votes from the page
VERDICTS = ("a", "b", "tie", "both_bad", "skip", "unreadable")
LARGEST = 1e300  # score; differences of two stay finite
ORDERS = ("ab", "ba", "none")
# what a prompt is read from, or would be left out of it
_ASKED = ("prompt", *PROMPTS, "input", "history", "system", "tools", *MEDIA)
MOST = 65  # candidates of one prompt: what `pairs generate` may make, and a person's

Key = tuple[str, int, int, str, str, str | None]


@dataclass(frozen=True)
class Prompt:
    """What is answered. id: of the rendered text, so the same prompt has the same everywhere."""

    turns: Turns
    tools: tuple[dict[str, Any], ...] | None = None
    answer: str | None = None  # a person's, where the row brought one

    @property
    def text(self) -> str:
        """The last turn's."""
        return str(self.turns[-1]["content"])

    @property
    def fields(self) -> dict[str, Any]:
        """As a row of data has them."""
        plain = len(self.turns) == 1 and set(self.turns[0]) == {"role", "content"}
        prompt = self.turns[0]["content"] if plain else [dict(turn) for turn in self.turns]
        return {"prompt": prompt} | ({"tools": list(self.tools)} if self.tools else {})


@dataclass(frozen=True)
class Candidate:
    """One answer. logp: nats at temperature 1, None where no model said it."""

    text: str
    tokens: int
    finish: str
    logp: float | None = None
    seed: int | None = None
    temp: float | None = None
    model: str = ""

    @property
    def cut(self) -> bool:
        """It ended by length."""
        return self.finish == "length"

    @property
    def digest(self) -> str:
        """Names the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@dataclass(frozen=True)
class Candidates:
    """A prompt and its answers."""

    id: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, Any]:
        answers = [vars(candidate) for candidate in self.candidates]
        return {"id": self.id, **self.prompt.fields, "candidates": answers}

    def texts(self, a: int, b: int) -> str:
        """Names two answers by what they say."""
        return f"{self.candidates[a].digest}-{self.candidates[b].digest}"

    def has(self, verdict: Verdict) -> bool:
        """Whether a verdict is on answers of these; one that names no texts is taken at its word.

        It may name the prompt and be on answers that stood here before.
        """
        return is_on(verdict, [one.digest for one in self.candidates])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one judge said of two answers. p: that a is the better one, where the judge gives it."""

    id: str
    a: int
    b: int
    order: str
    verdict: str
    judge: str
    p: float | None = None
    score_a: float | None = None
    score_b: float | None = None
    raw: str = ""
    time: float | None = None
    edited: str | None = None  # a person's own text, which beats both
    texts: str | None = None  # digests of a's and b's: `Candidates.texts`

    @property
    def key(self) -> Key:
        return self.id, self.a, self.b, self.order, self.judge, self.texts

    def as_dict(self) -> dict[str, Any]:
        record = {one.name: getattr(self, one.name) for one in fields(self)}
        seldom = ("edited", "texts")
        return {n: v for n, v in record.items() if v is not None or n not in seldom}


@dataclass
class CandidateFile:
    """Where each prompt's line lies; texts stay on disk until they are asked for."""

    path: Path
    offsets: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    def get(self, id: str) -> Candidates:
        record = lines.read_record(self.path, self.offsets[id])
        return parse_candidates(record, f"{self.path.name}, id {id}")

    def __iter__(self) -> Iterator[Candidates]:
        return (self.get(id) for id in self.offsets)


def is_on(verdict: Verdict, digests: Sequence[str]) -> bool:
    """Whether a verdict is on two of the answers with these digests; see `Candidates.has`."""
    a, b = verdict.a, verdict.b
    if max(a, b) >= len(digests):
        return False
    return verdict.texts is None or verdict.texts == f"{digests[a]}-{digests[b]}"


def on_these(found: CandidateFile, verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those on answers of this file; each prompt is read once."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.id, []).append(verdict)
    there = ((found.get(id), group) for id, group in groups.items() if id in found.offsets)
    return [verdict for one, group in there for verdict in group if one.has(verdict)]


def prompt_id(rendered: str) -> str:
    return hashlib.sha256(rendered.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def parse_prompt(record: Mapping[str, Any], where: str) -> Prompt:
    """A prompt as rows of data write it: text, messages or a transcript, with system and tools,
    where there is no `prompt` under one of the other names that data have for it.

    An `answer`, or the `chosen` of a finished pair, is a person's answer.
    Raises: DataError.
    """
    known = {name: record[name] for name in _ASKED if name in record}
    if all(known.get(name) is None for name in ("prompt", *PROMPTS)):
        raise DataError(f"{where}: no 'prompt' (the row has: {', '.join(map(str, record))[:80]}).")
    try:
        row = parse_row(known | {"chosen": "a", "rejected": "b"}, where=where)
    except RowFault as fault:
        raise DataError(f"{where}: {fault}.") from fault
    answer = _answer(record.get("answer", record.get("chosen")), row.prompt)
    return Prompt(row.prompt, row.tools, answer if _says_something(answer) else None)


def _answer(value: Any, prompt: Turns) -> str | None:
    """A text, or what one message of the assistant says, alone or behind the prompt's turns."""
    try:
        said = conversation_in(value, "answer") if isinstance(value, str) else value
        turns = messages(said, "answer") if isinstance(said, list | Mapping) else ()
    except RowFault:
        return None
    if not turns:
        return value if isinstance(value, str) else None
    *before, last = turns
    fits = last.keys() == {"role", "content"} and tuple(before) in ((), prompt)
    return last["content"] if fits and last["role"] == "assistant" else None


def parse_candidates(record: Any, where: str) -> Candidates:
    """Raises: DataError naming the place, what was found and what was wanted."""
    record = _object(record, where)
    id = _text(record, "id", where)
    if not id or len(id) > 200:
        raise DataError(f"{where}: id of {len(id)} characters, wanted 1 to 200.")
    found = record.get("candidates")
    if not isinstance(found, list) or not 1 <= len(found) <= MOST:
        raise DataError(f"{where}: candidates is no list of 1 to {MOST} answers.")
    answers = tuple(_candidate(one, f"{where}, candidate {n}") for n, one in enumerate(found))
    return Candidates(id, parse_prompt(record, where), answers)


def parse_verdict(record: Any, where: str) -> Verdict:
    """Raises: DataError naming the place, what was found and what was wanted."""
    record = _object(record, where)
    if not {"a", "b", "verdict"} & record.keys():
        raise DataError(
            f"{where}: no verdict (the row has: {', '.join(map(str, record))[:80]}). Is it a file "
            "of verdicts, of `pairs judge` or `pairs rate`?"
        )
    a, b = (_whole(record, name, where) for name in ("a", "b"))
    if a == b or not (0 <= a < MOST and 0 <= b < MOST):
        raise DataError(f"{where}: a {a} and b {b}, wanted two different candidates.")
    order, verdict = (_text(record, name, where) for name in ("order", "verdict"))
    for name, value, allowed in (("order", order, ORDERS), ("verdict", verdict, VERDICTS)):
        if value not in allowed:
            raise DataError(f"{where}: {name} {value[:40]!r}, wanted one of {', '.join(allowed)}.")
    p = _number(record, "p", where)
    if p is not None and not 0 <= p <= 1:
        raise DataError(f"{where}: p {p}, wanted 0 to 1.")
    edited = record.get("edited")
    if edited is not None and not _says_something(edited):
        raise DataError(f"{where}: edited is no text.")
    texts = record.get("texts")
    if texts is not None and not re.fullmatch("[0-9a-f]{8}-[0-9a-f]{8}", str(texts)):
        raise DataError(f"{where}: texts {str(texts)[:40]!r}, wanted two digests of eight digits.")
    return Verdict(
        _text(record, "id", where), a, b, order, verdict, _text(record, "judge", where), p,
        _number(record, "score_a", where), _number(record, "score_b", where),
        str(record.get("raw") or "")[:10_000], _number(record, "time", where), edited,
        texts,
    )  # fmt: skip


def open_candidates(path: Path) -> CandidateFile:
    """Every line checked, offsets kept; the last line of an id counts. Raises: DataError."""
    found = CandidateFile(path)
    for number, offset, line in lines.read_lines(path):
        where = f"{path.name}:{number}"
        found.offsets[parse_candidates(lines.decode(line, where), where).id] = offset
    return found


def read_verdicts(path: Path) -> dict[Key, Verdict]:
    """The verdicts that count, by their keys. Raises: DataError."""
    found: dict[Key, Verdict] = {}
    for number, _, line in lines.read_lines(path):
        where = f"{path.name}:{number}"
        record = lines.decode(line, where) | {"raw": ""}  # what is not needed stays on disk
        verdict = parse_verdict(record, where)
        found[verdict.key] = verdict
    return found


def _object(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: wanted an object, found {type(record).__name__}.")
    return record


def _candidate(record: Any, where: str) -> Candidate:
    record = _object(record, where)
    finish = _text(record, "finish", where)
    if finish not in ("stop", "length"):
        raise DataError(f"{where}: finish {finish[:40]!r}, wanted stop or length.")
    seed = record.get("seed")
    if seed is not None:
        _whole(record, "seed", where)
    return Candidate(
        _text(record, "text", where), _whole(record, "tokens", where), finish,
        _number(record, "logp", where), seed, _number(record, "temp", where),
        str(record.get("model") or "")[:400],
    )  # fmt: skip


def _says_something(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if value is None:
        raise DataError(f"{where}: no {name!r} in it. Is it a file that `fpo-mlx pairs` wrote?")
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind(value)}, wanted a text.")
    return value


def _whole(record: Mapping[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if type(value) is not int or value < 0:
        raise DataError(f"{where}: {name} {str(value)[:40]}, wanted a whole number, 0 or more.")
    return value


def _number(record: Mapping[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or abs(value) > LARGEST or not math.isfinite(value):
        raise DataError(
            f"{where}: {name} {str(value)[:40]}, wanted a finite number of at most {LARGEST:g}."
        )
    return float(value)
