"""The data doctor: everything about a set of pairs that would waste or spoil a run."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.data.oddities import control_token_in, odd_text
from fpo_mlx.data.read import SPLITS, RawRow, parse_raw
from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns, PreferenceRow, RowFault
from fpo_mlx.data.tokenize import Tokenizer, ends_its_turn, tokenize_row, truncate_pairs
from fpo_mlx.records import TokenPair
from fpo_mlx.storage import files

# What becomes of a row: "refused" rows stop a run, "spare" rows can be trained on (or are dropped
# by themselves) but are left out of the clean set, "warning" rows stay in it.
LEVELS: dict[str, str] = {
    "unreadable": "refused",
    "missing field": "refused",
    "empty field": "refused",
    "wrong type": "refused",
    "out of range": "refused",
    "role order": "refused",
    "no shared prompt": "refused",
    "same response": "refused",
    "broken text": "refused",
    "template": "refused",
    "prompt not a prefix": "refused",
    "duplicate": "spare",
    "contradiction": "spare",
    "leakage": "spare",
    "dropped": "spare",
    "same after cut": "spare",
    "cut": "warning",
    "no end of turn": "warning",
    "control token": "warning",
    "odd unicode": "warning",
    "length bias": "warning",
}


@dataclass(frozen=True)
class Finding:
    kind: str  # a key of LEVELS
    split: str
    where: str  # "train.jsonl:12"; the name of the split for a finding about all of it
    what: str

    @property
    def level(self) -> str:
        return LEVELS[self.kind]

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class SplitSummary:
    """One split in figures. Lengths are tokens, or characters if there was no tokenizer."""

    rows: int
    refused: int
    clean: int
    chosen_length: float  # mean over the rows that were not refused
    rejected_length: float
    longer_chosen: float  # share of the pairs of unequal length whose chosen one is the longer


@dataclass(frozen=True)
class CheckReport:
    splits: dict[str, SplitSummary]
    findings: tuple[Finding, ...]
    clean: dict[str, list[Any]]  # the records without refused and spare rows, as they were read
    max_seq_length: int | None

    @property
    def refused(self) -> int:
        """Rows that stop a run."""
        return sum(split.refused for split in self.splits.values())

    def lines(self) -> list[str]:
        """One line for each split, then one for each kind of finding, the gravest first."""
        lines = [
            f"{name}: {split.rows} rows, {split.refused} refused, {split.clean} in the clean set; "
            f"chosen is longer in {split.longer_chosen:.0%} of the pairs"
            for name, split in self.splits.items()
        ]
        counts = Counter(finding.kind for finding in self.findings)
        for kind, level in LEVELS.items():
            if counts[kind]:
                first = next(finding for finding in self.findings if finding.kind == kind)
                more = f" (and {counts[kind] - 1} more)" if counts[kind] > 1 else ""
                lines.append(f"{level:<8} {kind:<20} {counts[kind]:>6}  {first}{more}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The clean records are not in it."""
        return {
            "refused": self.refused,
            "max_seq_length": self.max_seq_length,
            "splits": {name: dict(vars(split)) for name, split in self.splits.items()},
            "kinds": dict(Counter(finding.kind for finding in self.findings)),
            "findings": [{**vars(finding), "level": finding.level} for finding in self.findings],
        }


@dataclass(frozen=True)
class _Usable:
    """A row that is not refused, and its tokens where there is a tokenizer."""

    raw: RawRow
    row: PreferenceRow
    pair: TokenPair | None

    @property
    def lengths(self) -> tuple[int, int]:
        if self.pair is not None:
            return len(self.pair.chosen), len(self.pair.rejected)
        chosen, rejected = (
            sum(len(turn["content"]) for turn in turns)
            for turns in (self.row.chosen, self.row.rejected)
        )
        return chosen, rejected


def check_data(
    splits: Mapping[str, Sequence[RawRow]],
    tokenizer: Tokenizer | None = None,
    max_seq_length: int | None = None,
    columns: Columns = DEFAULT_COLUMNS,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Check every row by itself and against all others.

    splits: rows as `read_raw` gives them, by split name. Without a tokenizer the checks of the
    chat template and of lengths in tokens are left out; without max_seq_length, those of cuts.
    progress: called with the number of rows done.

    Never raises for bad rows: they are findings.
    """
    findings: list[Finding] = []
    usable: dict[str, list[_Usable]] = {name: [] for name in _in_order(splits)}
    done = 0
    for name, rows in usable.items():
        for raw in splits[name]:
            found, good = _check_row(raw, name, tokenizer, max_seq_length, columns)
            findings += found
            if good is not None:
                rows.append(good)
            done += 1
            if progress is not None:
                progress(done)
    for name, rows in usable.items():
        findings += _repeats(name, rows)
        findings += _length_bias(name, rows)
    findings += _leakage(usable)
    left_out = {
        (finding.split, finding.where) for finding in findings if finding.level != "warning"
    }
    clean = {
        name: [item.raw.record for item in rows if (name, item.raw.where) not in left_out]
        for name, rows in usable.items()
    }
    summaries = {
        name: _summary(len(splits[name]), rows, len(clean[name])) for name, rows in usable.items()
    }
    return CheckReport(summaries, tuple(findings), clean, max_seq_length)


def write_clean(clean: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Write each split that has rows as folder/<split>.jsonl, whole or not at all.

    Returns the files written. Raises FpoError if folder cannot be written to.
    """
    return [
        _write_lines(folder / f"{name}.jsonl", map(_json_line, records))
        for name, records in clean.items()
        if records
    ]


def _check_row(
    raw: RawRow,
    split: str,
    tokenizer: Tokenizer | None,
    max_seq_length: int | None,
    columns: Columns,
) -> tuple[list[Finding], _Usable | None]:
    """What is to be said of one row, and the row itself unless it is refused."""
    try:
        row = parse_raw(raw, columns)
        pair = None if tokenizer is None else tokenize_row(row, tokenizer)
    except RowFault as fault:
        return [Finding(fault.kind, split, raw.where, str(fault))], None
    said = list(_text_findings(row, () if tokenizer is None else tokenizer.control_tokens))
    if tokenizer is not None and pair is not None:
        said += _token_findings(pair, tokenizer, max_seq_length)
    return [Finding(kind, split, raw.where, what) for kind, what in said], _Usable(raw, row, pair)


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


def _token_findings(
    pair: TokenPair, tokenizer: Tokenizer, max_seq_length: int | None
) -> Iterator[tuple[str, str]]:
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not ends_its_turn(response, tokenizer):
            yield (
                "no end of turn",
                f"{name} does not end with an end-of-sequence token; the model will not learn to "
                "stop (look at the chat template, or at eos_token_id in generation_config.json)",
            )
    if max_seq_length is None:
        return
    report = truncate_pairs([pair], max_seq_length).report
    for drop in report.dropped:
        yield (
            "dropped",
            f"the prompt has {drop.prompt_tokens} tokens and leaves no room for a response within "
            f"{max_seq_length}",
        )
    for cut in report.cut:
        yield "cut", f"{cut.response} is cut from {cut.tokens} to {cut.kept} tokens"
    if report.same_after_cut:
        yield "same after cut", f"cut at {max_seq_length} tokens, chosen and rejected are the same"


def _repeats(split: str, rows: Sequence[_Usable]) -> Iterator[Finding]:
    """Duplicates (all but the first), and pairs that also stand there the other way round."""
    seen: dict[tuple[str, str, str], str] = {}
    for item in rows:
        prompt, chosen, rejected = _keys(item.row)
        where = item.raw.where
        first = seen.setdefault((prompt, chosen, rejected), where)
        if first != where:
            yield Finding("duplicate", split, where, f"the same pair as {first}")
    for item in rows:
        prompt, chosen, rejected = _keys(item.row)
        other = seen.get((prompt, rejected, chosen))
        if other is not None:
            what = f"chosen and rejected are the other way round in {other}"
            yield Finding("contradiction", split, item.raw.where, what)


def _leakage(splits: Mapping[str, Sequence[_Usable]]) -> Iterator[Finding]:
    """Prompts that stand in two splits. The copy nearer to training is the one to leave out."""
    places: dict[str, dict[str, str]] = defaultdict(dict)  # prompt -> split -> where
    for name, rows in splits.items():
        for item in rows:
            places[_prompt_key(item.row)].setdefault(name, item.raw.where)
    order = list(splits)
    for name, rows in splits.items():
        later = order[order.index(name) + 1 :]
        for item in rows:
            held = places[_prompt_key(item.row)]
            other = next((held[split] for split in later if split in held), None)
            if other is not None:
                yield Finding("leakage", name, item.raw.where, f"its prompt is also in {other}")


def _length_bias(split: str, rows: Sequence[_Usable]) -> Iterator[Finding]:
    """A share that is both large (10 points off even) and no accident (3 standard errors)."""
    share, unequal = _longer_chosen(rows)
    off = abs(share - 0.5)
    if off >= 0.1 and off * 2 * math.sqrt(unequal) >= 3:
        side = "longer" if share > 0.5 else "shorter"
        portion = share if share > 0.5 else 1 - share
        yield Finding(
            "length bias",
            split,
            split,
            f"chosen is the {side} response in {portion:.0%} of {unequal} pairs; the model may "
            "learn length instead of the preference (objectives that normalise by length help)",
        )


def _longer_chosen(rows: Sequence[_Usable]) -> tuple[float, int]:
    """(share of pairs whose chosen response is the longer, pairs of unequal length)."""
    lengths = [item.lengths for item in rows]
    unequal = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    return (sum(unequal) / len(unequal) if unequal else 0.5), len(unequal)


def _summary(total: int, rows: Sequence[_Usable], clean: int) -> SplitSummary:
    lengths = [item.lengths for item in rows]
    count = max(len(lengths), 1)
    return SplitSummary(
        rows=total,
        refused=total - len(rows),
        clean=clean,
        chosen_length=sum(chosen for chosen, _ in lengths) / count,
        rejected_length=sum(rejected for _, rejected in lengths) / count,
        longer_chosen=_longer_chosen(rows)[0],
    )


def _keys(row: PreferenceRow) -> tuple[str, str, str]:
    prompt, chosen, rejected = (
        json.dumps(part, sort_keys=True)
        for part in ((row.prompt, row.tools), row.chosen, row.rejected)
    )
    return prompt, chosen, rejected


def _prompt_key(row: PreferenceRow) -> str:
    """The prompt without system message, letter case and spacing."""
    turns = [
        (turn["role"], " ".join(turn["content"].casefold().split()))
        for turn in row.prompt
        if turn["role"] not in ("system", "developer")
    ]
    return json.dumps(turns)


def _in_order(splits: Mapping[str, Any]) -> list[str]:
    known = [name for name in SPLITS if name in splits]
    return known + [name for name in splits if name not in known]


def _json_line(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a column that is not used
        return json.dumps(record, default=str).encode("ascii") + b"\n"


def _write_lines(path: Path, lines: Iterator[bytes]) -> Path:
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(lines)
    return path
