"""Preference pairs from candidates and verdicts, in the files that `train` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fpo_mlx.config import load_config, load_section
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs import choose
from fpo_mlx.pairs.choose import Left, Pair
from fpo_mlx.pairs.doubles import finder
from fpo_mlx.pairs.labels import by_prompt, labels_of, newest_judges
from fpo_mlx.pairs.records import (
    HUMAN,
    PERSON,
    CandidateFile,
    Candidates,
    Verdict,
    on_these,
    open_candidates,
    read_verdicts,
)
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig
from fpo_mlx.pairs.summary import JudgeSummary, summarise
from fpo_mlx.pipeline.check import check
from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.pairs_judge import pairs_judge
from fpo_mlx.records import PAIRS_FILE
from fpo_mlx.storage import files
from fpo_mlx.storage.lines import json_line
from fpo_mlx.storage.outputs import Made, claim_folder

FEWEST = 30
ALONE = "a prompt with one answer, which has none to be better than"
UNJUDGED = "a prompt without verdicts"
CUT = f"{UNJUDGED}, with fewer than two answers that were not cut"
ALIKE = f"{UNJUDGED}, whose answers are all equal"
ABOUT = PAIRS_FILE  # beside the rows: settings and figures
MADE = Made("a set of pairs", r"(train|valid|test)\.jsonl|pairs\.json", whole=True, mark=ABOUT)


class TooFewPairs(DataError):
    """None, or fewer than are asked for."""


@dataclass(frozen=True)
class BuildReport:
    """left: what makes no pair, by reason; longer_share: of pairs, the longer answer chosen.

    judges: figures over the verdicts that count; agreement is that with a person's votes.
    """

    pairs: int
    splits: dict[str, int]
    prompts: int
    left: dict[str, int]
    longer_share: float | None
    mean_score_chosen: float
    mean_score_rejected: float
    mean_agreement: float
    tokens_chosen: float  # mean
    tokens_rejected: float
    judges: dict[str, JudgeSummary]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def pairs_build(
    settings: BuildConfig,
    *,
    candidates: Path,
    verdicts: Sequence[Path],
    reward: str | None = None,
    output: Path,
    overwrite: bool = False,
    say: Say,
) -> BuildReport:
    """Choose pairs, split them by prompt, write them, and check them.

    reward: judges first, as `pairs_judge` does, into a file beside the candidates.

    Raises: ConfigError, TooFewPairs (none, or fewer than 30 without `force`), DataError; FpoError.
    """
    own = candidates.with_name(f"{candidates.stem}-rewards.jsonl")
    inputs = [candidates, *verdicts, *([own] if reward else [])]
    claim = partial(claim_folder, output, "--output", MADE, inputs=inputs, overwrite=overwrite)
    output = claim()
    found, left = open_candidates(candidates), Left()
    given = [v for path in verdicts for v in read_verdicts(path).values()]
    asked = None
    if reward:
        judged, asked = _by_reward(reward, settings, candidates, own, say)
        given += judged
    known = _on_these(found, _named(given, settings), left)
    known = _of_newest(known, found, left, say, asked)
    if settings.reward_augmented:
        _check_one_scale(known)
    judges = _judges(known, found)
    pairs = _choose(found, known, settings, left, say)
    if settings.balance_length:
        pairs = choose.balanced(pairs, settings.seed, left)
    ids = (pair.id for pair in pairs)
    splits = choose.split_of(
        ids, found.offsets, settings.valid_share, settings.test_share, settings.seed
    )
    report = _report(pairs, splits, found, left, settings, judges)
    if not pairs or (len(pairs) < FEWEST and not settings.force):
        raise TooFewPairs(_too_few(len(pairs), len(found), left))
    _write(pairs, splits, settings, report, output, claim)
    _check(output, say)
    return report


def _too_few(pairs: int, prompts: int, left: Left) -> str:
    """Why, and what to do: no judging helps a prompt that has one answer."""
    why = ", ".join(f"{n} × {reason}" for reason, n in left.counts.items()) or "no verdicts"
    way = _way(left.counts)
    force = "--force (in a file of rounds `build: {force: true}`)"
    way += f"; {force} writes these" if pairs else ""
    return (
        f"{pairs} pairs from {prompts} prompts are too few to learn from ({why}). "
        f"Wanted {FEWEST}: {way}."
    )


def _way(left: Mapping[str, int]) -> str:
    if left.get(ALONE):
        return "answer each prompt several times (`pairs generate --n 4`, to a new --output)"
    ways, cut = ["answer more prompts"], left.get(CUT) or left.get(choose.CUT)
    if cut:
        ways.append("let answers end (`pairs generate`, a larger `--max-tokens`, a new --output)")
        ways.append(
            "keep cut ones (`--keep-cut` of both `pairs judge` and `pairs build`, in a file of "
            "rounds `build: {keep_cut: true}`)"
        )
    if left.get(UNJUDGED) or not cut:
        ways.append("judge more of them")
    return ", or ".join(ways)


def _by_reward(
    reward: str, settings: BuildConfig, candidates: Path, output: Path, say: Say
) -> tuple[list[Verdict], str]:
    """This reward's verdicts, and its name; the file keeps those of earlier ones."""
    given = {"reward": reward, "against_reference": settings.against_reference}
    asked = load_section(JudgeConfig, given)  # which spells ~ out
    judged = pairs_judge(asked, candidates=candidates, output=output, say=say)
    say(f"{judged.written} verdicts of {reward} in {output}")
    return [v for v in read_verdicts(output).values() if v.judge == judged.judge], judged.judge


def _named(given: Sequence[Verdict], settings: BuildConfig) -> dict[str, list[Verdict]]:
    """By prompt the last verdict of each key, of the judge that is asked for, and a person's."""
    known = {verdict.key: verdict for verdict in given}
    if settings.judge_name:
        judges = sorted({v.judge for v in known.values()})
        # a person's own text has no score to ask for
        wanted = {settings.judge_name} | (set() if settings.reward_augmented else {PERSON})
        known = {key: v for key, v in known.items() if v.judge in wanted}
        if judges and settings.judge_name not in judges:
            raise ConfigError(
                f"--judge-name {settings.judge_name}: no verdict of that name; found "
                f"{', '.join(judges)}."
            )
    return by_prompt(known.values())


def _on_these(
    found: CandidateFile, known: dict[str, list[Verdict]], left: Left
) -> dict[str, list[Verdict]]:
    """Without the verdicts on other answers; one on an unknown prompt is told of elsewhere."""
    kept = by_prompt(on_these(found, (v for group in known.values() for v in group)))
    there = {id: group for id, group in known.items() if id in found.offsets}
    lost = sum(len(group) - len(kept.get(id, ())) for id, group in there.items())
    left.out("verdicts on answers that are not among the candidates", lost)
    return known | {id: kept.get(id, []) for id in there}


def _of_newest(
    known: dict[str, list[Verdict]], found: CandidateFile, left: Left, say: Say,
    asked: str | None,
) -> dict[str, list[Verdict]]:  # fmt: skip
    """Without judges of which there is a newer version: it was to be another. Says who counts."""
    there = (v for id, group in known.items() if id in found.offsets for v in group)
    judges, older = newest_judges(there, asked)
    for old, new in older.items():
        who = "the one of --reward" if new == asked else "the one that judged last"
        say(f"{old} is left out: of this name {who} counts, {new} (else --judge-name {old})")
    if len(judges) > 1:
        say(
            f"{len(judges)} judges count, {', '.join(judges)}: more than half of those that judged "
            "two answers must agree, or they tie. One of them alone: --judge-name NAME"
        )
    verdicts = [v for group in known.values() for v in group]
    kept = [v for v in verdicts if v.judge not in older]
    left.out("verdicts of another judge of the same name", len(verdicts) - len(kept))
    return by_prompt(kept)


def _check_one_scale(known: Mapping[str, Sequence[Verdict]]) -> None:
    """A wanted score means something on one judge's scale only. Raises: ConfigError."""
    verdicts = [verdict for of_it in known.values() for verdict in of_it]
    judges = sorted({verdict.judge for verdict in verdicts})
    if len(judges) > 1 and any(verdict.score_a is not None for verdict in verdicts):
        raise ConfigError(
            "--reward-augmented asks the model for a score, and these judges give theirs on scales "
            f"of their own: {', '.join(judges)}. Take one of them: --judge-name NAME."
        )


def _judges(known: dict[str, list[Verdict]], found: CandidateFile) -> dict[str, JudgeSummary]:
    verdicts = [v for id, of_it in known.items() if id in found.offsets for v in of_it]
    judges = summarise(verdicts, lambda id: [c.tokens for c in found.get(id).candidates], verdicts)
    if PERSON in judges:  # who agrees with themselves
        judges[PERSON] = dataclasses.replace(judges[PERSON], agreement=None, kappa=None)
    return judges


def _choose(
    found: CandidateFile, verdicts: dict[str, list[Verdict]], settings: BuildConfig, left: Left,
    say: Say,
) -> list[Pair]:  # fmt: skip
    is_new = finder(settings.near_duplicates, say)
    pairs = []
    for one in found:
        if one.id not in verdicts:
            left.out(_unjudged(one, settings))
            continue
        for pair in choose.pairs_of(one, labels_of(verdicts.pop(one.id)), settings, left):
            if not is_new((one.prompt.text, pair.chosen, pair.rejected)):
                left.out("a double")
            elif settings.reward_augmented and choose.asks_alike(pair):
                left.out("scores alike in two digits")
            else:
                pairs.append(pair)
    lost = sum(map(len, verdicts.values()))
    left.out("verdicts on prompts that are not among the candidates", lost)
    return pairs


def _unjudged(one: Candidates, settings: BuildConfig) -> str:
    """Why nobody judged this prompt's answers."""
    sides = [c for c in one.candidates if settings.against_reference or c.model != HUMAN]
    if len(sides) < 2:
        return ALONE
    if sum(not c.cut for c in sides) < 2:
        return CUT
    return ALIKE if len({c.text.strip() for c in sides}) < 2 else UNJUDGED


def _report(
    pairs: Sequence[Pair], splits: Mapping[str, str], found: CandidateFile, left: Left,
    settings: BuildConfig, judges: dict[str, JudgeSummary],
) -> BuildReport:  # fmt: skip
    def mean(name: str) -> float:
        return sum(getattr(pair, name) for pair in pairs) / max(1, len(pairs))

    def length(side: int) -> float:
        return sum(pair.tokens[side] for pair in pairs) / max(1, len(pairs))

    counts = {name: 0 for name in ("train", "valid", "test")}
    for pair in pairs:
        counts[splits[pair.id]] += 1 + settings.reward_augmented
    return BuildReport(
        len(pairs), counts, len(found), dict(left.counts), choose.longer_share(pairs),
        mean("score_chosen"), mean("score_rejected"), mean("agreement"), length(0), length(1),
        judges,
    )  # fmt: skip


def _write(
    pairs: Sequence[Pair], splits: Mapping[str, str], settings: BuildConfig, report: BuildReport,
    output: Path, claim: Callable[[], object],
) -> None:  # fmt: skip
    with files.atomic_folder(output, claim) as folder:
        for name, count in report.splits.items():
            if not count:
                continue
            with open(folder / f"{name}.jsonl", "wb") as out:
                for pair in pairs:
                    if splits[pair.id] == name:
                        rows = choose.augmented(pair) if settings.reward_augmented else (pair,)
                        out.writelines(json_line(row.row()) for row in rows)
        about = {"settings": dataclasses.asdict(settings), **report.as_dict()}
        files.write_json(folder / ABOUT, about)


def _check(folder: Path, say: Say) -> None:
    found = check(load_config({"data": str(folder)}), fix=None, say=say, of_rows_alone=True)
    for finding in found.findings[:10]:
        say(f"check: {finding}")
