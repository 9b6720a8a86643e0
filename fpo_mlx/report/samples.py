"""Feature changes and sample answers, from what `features` and `compare` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpo_mlx.report.read import Run, figure, is_of, on_training, part
from fpo_mlx.report.tables import Table, number, text

FEATURES, ANSWERS = 30, 12  # shown of each run; the files hold the rest
LINKS = ("https://www.neuronpedia.org/", "https://neuronpedia.org/")
COLUMNS = {  # key of a feature's row -> title; other keys come after these, as they are
    "feature": "Feature",
    "label": "Label",
    "chosen_before": "Chosen before",
    "chosen_after": "Chosen after",
    "rejected_before": "Rejected before",
    "rejected_after": "Rejected after",
    "change": "Change",
    "effect_size": "Effect size",
    "share_of_d": "Share of D",
    "tokens": "Tokens where it fires most",
}
CONTEXTS = "contexts"  # of a feature's row: where it fires most, the strongest first


@dataclass(frozen=True)
class Answer:
    """One prompt and what each model made of it: (name, text)."""

    prompt: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answers:
    run: str
    shown: Sequence[Answer]
    left_out: int


def features(run: Run) -> Table | None:
    """The features that moved most, as the file orders them."""
    found = run.results.get("features")
    rows = _rows(found.value if found else None, "features")
    if not found or not rows:
        return None
    shown = rows[:FEATURES]
    keys = [k for k in COLUMNS if any(k in row for row in shown)]
    keys += [k for k in dict.fromkeys(k for r in shown for k in r) if k not in COLUMNS]
    keys = [k for k in keys if _tells(shown, k)]
    links = {(i, 0): url for i, row in enumerate(shown) if (url := _link(row))}
    notes = ["Of training pairs."] if on_training(found.value) else []
    notes += [f"The first {len(shown)} of {len(rows)}."] if len(rows) > len(shown) else []
    cells = [[_cell(row.get(k)) for k in keys] for row in shown]
    head = [COLUMNS.get(k, k) for k in keys]
    if any(_examples(row) for row in shown):
        head.append("Where")
        cells = [[*line, _examples(row)] for line, row in zip(cells, shown, strict=True)]
    return Table(f"Features that moved: {run.name}", head, cells, note=" ".join(notes), links=links)


def _rows(value: Any, name: str) -> list[Mapping[str, Any]]:
    """The list of records under this name."""
    found = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(found, Sequence) and not isinstance(found, str):
        return [row for row in found if isinstance(row, Mapping)]
    return []


def _tells(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a column holds anything but addresses, records, blanks and one SAE's number."""
    values = [row.get(key) for row in rows]
    if key == CONTEXTS or (key == "sae" and len({text(v) for v in values}) == 1):
        return False
    return any(v not in (None, "", []) for v in values) and not any(
        isinstance(v, Mapping) or str(v).startswith(("http://", "https://")) for v in values
    )


def _link(row: Mapping[str, Any]) -> str:
    """Neuronpedia's page of a feature; no other address becomes a link."""
    return next((v for v in row.values() if isinstance(v, str) and v.startswith(LINKS)), "")


def _examples(row: Mapping[str, Any]) -> str:
    """Two texts in which the feature fires, one line each; the token stands between « and »."""
    found = row.get(CONTEXTS)
    listed = found if isinstance(found, Sequence) and not isinstance(found, str) else ()
    texts = [one.get("text") for one in listed if isinstance(one, Mapping)]
    return "\n".join(" ".join(t.split()) for t in texts[:2] if isinstance(t, str))


def _cell(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(repr(v) if isinstance(v, str) else _cell(v) for v in value[:6])
    plain = figure(value)
    return text(value) if plain is None else number(plain)


def answers(run: Run) -> Answers | None:
    found = run.results.get("compare")
    rows = _rows(found.value if found else None, "prompts")
    made = [a for row in rows if (a := _answer(row, run))]
    return Answers(run.name, made[:ANSWERS], max(0, len(made) - ANSWERS)) if made else None


def _answer(row: Mapping[str, Any], run: Run) -> Answer | None:
    cut = row.get("cut")
    marked = cut if isinstance(cut, list) else []
    texts = [
        (
            run.name if is_of(name, run.path) else str(name),
            text(answer) + "\n[cut at its limit]" * (name in marked),
        )
        for name, answer in part(row, "answers").items()
    ]
    return Answer(text(row.get("prompt")), texts) if texts else None
