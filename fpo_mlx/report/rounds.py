"""What a run's pairs were, and all rounds side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fpo_mlx.report.read import Run, figure, part
from fpo_mlx.report.tables import NONE, Table, number, text

PAIRS = {
    "pairs": "Pairs",
    "prompts": "Prompts with candidates",
    "mean_score_chosen": "Score of chosen, mean",
    "mean_score_rejected": "Score of rejected, mean",
    "tokens_chosen": "Length of chosen, mean (tokens)",
    "tokens_rejected": "Length of rejected, mean (tokens)",
    "longer_share": "Longer answer is the chosen one",
    "mean_agreement": "Agreement behind a label, mean",
}
JUDGES = {
    "compared": "Comparisons with a label",
    "flip_rate": "Flip rate: both orders name different answers",
    "first_share": "Answer shown first wins",
    "longer_share": "Longer answer wins",
    "ties": "Ties and both bad",
    "unreadable": "Verdicts that could not be read",
    "agreement": "Agreement with a person",
    "kappa": "Cohen's kappa with a person",
}
HELD_OUT = {
    "win_rate": "Held-out answers: wins against the round before",
    "tokens": "Held-out answers: length, mean (tokens)",
    "drift": "Chosen log-prob at the end of training, change (nats per token)",
}


def rounds(runs: Sequence[Run]) -> Table | None:
    """Figures down, runs across; None where no run's pairs are known."""
    known = [run for run in runs if run.pairs or run.round]
    if not known:
        return None
    rows = [
        *_rows(PAIRS, [run.pairs for run in known]),
        *_of_judges(known),
        *_rows(HELD_OUT, [run.round for run in known]),
    ]
    note = "Pairs as `pairs build` wrote them; of older pairs that were mixed in it says nothing."
    if any(run.round for run in known):
        note += " Below the share of wins: its 95 % interval over held-out prompts."
    return Table("Pairs and rounds", ["Figure", *(run.name for run in known)], rows, note=note)


def _rows(names: Mapping[str, str], columns: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for key, label in names.items():
        cells = [_cell(column, key) for column in columns]
        if any(cell != NONE for cell in cells):
            yield [label, *cells]


def _cell(column: Mapping[str, Any], key: str) -> str:
    cell, around = number(figure(column.get(key))), column.get("interval")
    if key == "win_rate" and isinstance(around, Sequence) and len(around) == 2:
        low, high = (number(figure(value), 3) for value in around)
        return f"{number(figure(column.get(key)), 3)}\n{low} to {high}"
    return cell


def _of_judges(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Without names where every run has one judge, whose name then has a row of its own."""
    found = [part(run.pairs, "judges") for run in runs]
    if all(len(judges) <= 1 for judges in found):
        names = [text(next(iter(judges), None)) for judges in found]
        if any(name != NONE for name in names):
            yield ["Judge", *names]
        yield from _rows(JUDGES, [part(j, next(iter(j))) if j else {} for j in found])
        return
    for name in dict.fromkeys(name for judges in found for name in judges):
        labels = {key: f"{label}; {name}" for key, label in JUDGES.items()}
        yield from _rows(labels, [part(judges, name) for judges in found])
