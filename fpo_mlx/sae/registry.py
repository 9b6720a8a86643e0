"""The shipped table of public SAEs: where they lie, what they fit, their Neuronpedia pages.

table.json is made by scripts/make/sae_table.py. A row: release, repo, family, model (hub id that it
was trained on), site, layers ("0-25"), widths; `prefix`: an SAE's id with the prefix is its path;
`rules`: [id, path, Neuronpedia id, places] with {L} and {n} for a place's block and average L0. A
place is L, [L, n] or [L, n, input scale].
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fpo_mlx.sae.check import DEEP
from fpo_mlx.sae.names import plain, stem

_TABLE = Path(__file__).parent / "table.json"


@dataclass(frozen=True)
class Rule:
    """One SAE of a release."""

    sae_id: str
    path: str  # in the repository
    neuronpedia: str | None
    factor: float | None  # scale of its inputs in training, where the files do not hold it
    layer: int

    @property
    def width(self) -> int:
        """Features by its name, to order a release's; 0 where the name does not say."""
        found = re.search(r"(?:width|resid_pre)_(\d+)([km]?)", self.sae_id)
        return int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2]] if found else 0


@dataclass(frozen=True)
class Release:
    """One line of `sae list`."""

    release: str
    repo: str
    family: str
    model: str  # hub id of the model it was trained on
    site: str  # one of records.SITE_KINDS
    layers: str  # "0-25", "9,20,31"
    widths: tuple[str, ...]
    prefix: str | None
    rules: tuple[Rule, ...]

    def path_of(self, sae_id: str) -> str | None:
        """The folder or file of `sae_id` in the repository; None if no such id is known."""
        for rule in self.rules:
            if rule.sae_id == sae_id:
                return rule.path
        if self.prefix is None:
            return None
        return sae_id if sae_id.startswith(self.prefix) else self.prefix + sae_id

    @property
    def example(self) -> str:
        """A value for --sae: near the output, of those the smallest, of those the deepest."""
        if self.rules:
            last = max(rule.layer for rule in self.rules)
            near = min(DEEP * blocks(stem(self.model)), last + 1)
            deep = [rule for rule in self.rules if rule.layer + 1 >= near]
            best = min((rule.width, -rule.layer) for rule in deep)
            equal = [rule.sae_id for rule in deep if (rule.width, -rule.layer) == best]
            equal.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
            return f"{self.release}/{equal[(len(equal) - 1) // 2]}"  # by sparsity in the middle
        return f"{self.repo}/…" if self.family == "sparsify" else f"{self.release}/…"


@cache
def releases() -> tuple[Release, ...]:
    """Every release of the table, by name."""
    rows = json.loads(_TABLE.read_text(encoding="utf-8"))["rows"]
    return tuple(_release(row) for row in rows)


@cache
def blocks(family: str) -> int:
    """Blocks of a model by its `stem`, as far up as any SAE of it reads."""
    rows = [row for row in releases() if stem(row.model) == family]
    numbers = [int(part) for row in rows for part in re.findall(r"\d+", row.layers)]
    return 1 + max(numbers, default=0)


def _release(row: dict[str, Any]) -> Release:
    made = [
        Rule(
            _filled(name, at),
            _filled(path, at),
            page and _filled(page, at),
            _factor(at),
            at if isinstance(at, int) else at[0],
        )  # fmt: skip
        for name, path, page, places in row.get("rules", ())
        for at in places
    ]
    names = ("release", "repo", "family", "model", "site", "layers")
    return Release(
        **{name: row[name] for name in names},
        widths=tuple(row["widths"]),
        prefix=row.get("prefix"),
        rules=tuple(made),
    )


def _filled(text: str, place: Any) -> str:
    layer, level = (place, "") if isinstance(place, int) else place[:2]
    return text.replace("{L}", str(layer)).replace("{n}", str(level))


def _factor(place: Any) -> float | None:
    return place[2] if isinstance(place, list) and len(place) > 2 else None


def named(release: str) -> Release | None:
    """The release of that exact name."""
    return next((found for found in releases() if found.release == release), None)


def facts(name: str) -> Rule | None:
    """What the table knows of the SAE in a path or name, e.g. a hub snapshot's path.

    Matches "repo/…/path", the hub cache's "models--org--name/snapshots/…/path", and "release/id".
    """
    text = name.replace("--", "/")
    best = None
    for release in releases():
        in_repo = _has(text, release.repo)
        if not in_repo and not _has(text, release.release):
            continue
        for rule in release.rules:
            ends = (rule.path,) if in_repo else (rule.path, rule.sae_id)
            hit = any(re.search(rf"/{re.escape(end)}(?=$|[/|])", text) for end in ends)
            if hit and (best is None or _rank(rule) < _rank(best)):
                best = rule
    return best


def _has(text: str, name: str) -> bool:
    """Whether a path has this name, and not only one that begins or ends with it."""
    if name not in text:
        return False  # nearly always, and cheaper than a pattern
    return re.search(rf"(?:^|/){re.escape(name)}(?=$|[/|@])", text) is not None


def _rank(rule: Rule) -> int:
    """Of two pages the shorter name, which is the canonical one without the __l0 suffix."""
    return len(rule.neuronpedia) if rule.neuronpedia else 1000


def fits(model: str | dict[str, Any]) -> list[Release]:
    """The releases for a model, those trained on exactly this model first.

    model: a hub id or path ("mlx-community/gemma-2-2b-it-4bit", "google/gemma-2-2b"), or a config
    with `_name_or_path`. A chat model also gets the SAEs of its base model, and the other way.
    """
    name = model if isinstance(model, str) else str(model.get("_name_or_path") or "")
    wanted = stem(name)
    if not wanted:
        return []
    found = [release for release in releases() if stem(release.model) == wanted]
    return sorted(found, key=lambda release: not trained_on(release, name))


def trained_on(release: Release, model: str) -> bool:
    """True if the release was trained on this very model, not its base or chat sibling."""
    return plain(release.model) == plain(model)
