"""The data doctor: everything about a set of pairs that would waste or spoil a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.data.containers import RawRow
from fpo_mlx.data.findings import LEVELS as LEVELS
from fpo_mlx.data.findings import (
    Finding,
    Seen,
    leakage,
    length_bias,
    longer_chosen,
    repeats,
    seen,
)
from fpo_mlx.data.inspect import Inspected, inspect
from fpo_mlx.data.read import SPLITS
from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns
from fpo_mlx.data.tokenize import Tokenizer, truncate_pairs
from fpo_mlx.data.variables import Asked
from fpo_mlx.records import TokenPair
from fpo_mlx.storage import files


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
    clean: dict[str, list[Any]]  # the records without refused and excluded rows, as they were read
    max_seq_length: int | None

    @property
    def refused(self) -> int:
        """Rows that stop a run."""
        return sum(split.refused for split in self.splits.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The clean records are not in it."""
        return {
            "refused": self.refused,
            "max_seq_length": self.max_seq_length,
            "splits": {name: dict(vars(split)) for name, split in self.splits.items()},
            "kinds": dict(Counter(finding.kind for finding in self.findings)),
            "findings": [{**vars(finding), "level": finding.level} for finding in self.findings],
        }

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> CheckReport:
        """The report whose `as_dict` this is, without its clean records."""
        fields = ("kind", "split", "where", "what")
        return CheckReport(
            {name: SplitSummary(**split) for name, split in given["splits"].items()},
            tuple(Finding(*(found[name] for name in fields)) for found in given["findings"]),
            {},
            given["max_seq_length"],
        )


def check_data(
    splits: Mapping[str, Iterable[RawRow]],
    tokenizer: Tokenizer | None = None,
    max_seq_length: int | None = None,
    columns: Columns = DEFAULT_COLUMNS,
    progress: Callable[[int], None] | None = None,
    keep_clean: bool = True,
    each: Callable[[str, Inspected], None] = lambda *_: None,
) -> CheckReport:
    """Check every row by itself and against all others.

    splits: rows as `iterate_raw` gives them, by split name. Without a tokenizer the checks of the
    chat template and of lengths in tokens are left out; without max_seq_length, those of cuts.
    progress: called with the number of rows done. keep_clean: keep the records of the clean set.
    each: called with the split and every row that was looked at.

    Never raises for bad rows: they are findings.
    """
    findings: list[Finding] = []
    usable: dict[str, list[Seen]] = {name: [] for name in _in_order(splits)}
    records: dict[str, list[Any]] = {name: [] for name in usable}
    totals = dict.fromkeys(usable, 0)
    asked, done = Asked(), 0
    for name, rows in usable.items():
        for item in inspect(splits[name], name, tokenizer, columns):
            each(name, item)
            findings += item.findings
            asked.refuse(item.fault)
            if item.row is not None:
                asked.take(item.row.variables)
                rows.append(seen(item.row, item.pair))
                records[name].append(item.raw.record if keep_clean else None)
            if item.pair is not None and max_seq_length is not None:
                findings += length_findings(item.pair, name, max_seq_length)
            totals[name] += 1
            done += 1
            if progress is not None:
                progress(done)
    findings = asked.findings(findings)
    for name, rows in usable.items():
        findings += repeats(name, rows)
        findings += length_bias(name, [row.lengths for row in rows])
    findings += leakage({n: [(row.topic, row.where) for row in rows] for n, rows in usable.items()})
    left_out = {(f.split, f.where) for f in findings if f.level != "warning"}
    clean = {
        name: [
            record
            for row, record in zip(rows, records[name], strict=True)
            if (name, row.where) not in left_out
        ]
        for name, rows in usable.items()
    }
    summaries = {
        name: _summary(totals[name], rows, len(clean[name])) for name, rows in usable.items()
    }
    held = clean if keep_clean else {}
    return CheckReport(summaries, tuple(findings), held, max_seq_length)


def write_clean(clean: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Write each split that has rows as folder/<split>.jsonl, whole or not at all.

    Returns the files written. Raises FpoError if folder cannot be written to.
    """
    return [
        _write_lines(folder / f"{name}.jsonl", map(_json_line, records))
        for name, records in clean.items()
        if records
    ]


def length_findings(pair: TokenPair, split: str, max_seq_length: int) -> Iterator[Finding]:
    """What the length limit costs one pair."""
    report = truncate_pairs([pair], max_seq_length).report
    for drop in report.dropped:
        what = (
            f"the prompt has {drop.prompt_tokens} tokens and leaves no room for a response within "
            f"{max_seq_length}"
        )
        yield Finding("dropped", split, pair.where, what)
    for cut in report.cut:
        what = f"{cut.response} is cut from {cut.tokens} to {cut.kept} tokens"
        yield Finding("cut", split, pair.where, what)
    if report.same_after_cut:
        what = f"cut at {max_seq_length} tokens, chosen and rejected are the same"
        yield Finding("same after cut", split, pair.where, what)


def _summary(total: int, rows: Sequence[Seen], clean: int) -> SplitSummary:
    lengths = [row.lengths for row in rows]
    count = max(len(lengths), 1)
    return SplitSummary(
        rows=total,
        refused=total - len(rows),
        clean=clean,
        chosen_length=sum(chosen for chosen, _ in lengths) / count,
        rejected_length=sum(rejected for _, rejected in lengths) / count,
        longer_chosen=longer_chosen(lengths)[0],
    )


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
