"""What the pairs teach, from the reference's cached features; and rows chosen by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fpo_mlx import data
from fpo_mlx.config import RunConfig, default_of, named, options
from fpo_mlx.data.feature_files import read_labels
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pipeline.feature_reward import FeatureReward
from fpo_mlx.pipeline.features import link, tapped_policy
from fpo_mlx.pipeline.job import Job, Say, columns, hub_splits, need_features, open_job, read_pairs
from fpo_mlx.pipeline.store import CachedScores, OnFill, reference_of
from fpo_mlx.records import Passage, TokenPair, result_file
from fpo_mlx.storage import files, outputs

if TYPE_CHECKING:
    from fpo_mlx.judge.feature_report import Context
    from fpo_mlx.judge.lessons import Example, Lesson, Lessons, PairFeatures

CHOSEN = outputs.Made("a set of chosen rows", r"(train|valid|test)\.jsonl")
SHOWN = 160  # letters of an example
CONTEXTS_OF = 100  # of the features found: the model reads the examples of each
AT_ONCE = 64  # features that are taken from the sparse rows in one look
WORDS = 6  # tokens that say what a feature goes with


@dataclass(frozen=True)
class DataAsked:
    """What `features data` is asked for beside the settings of a run.

    rate: of false discoveries; doubles: cosine from which two pairs are near doubles; against:
    probability of its label below which a row goes against the trend; contexts: let the model read
    the examples, to show the token; select: rows of a covering subset; drop_against: leave the
    rows against the trend out of `output`; reward: keep the regression as a judge of answers.
    """

    split: str = "train"
    limit: int | None = None
    rate: float = 0.05
    folds: int = 5
    examples: int = 2
    contexts: bool = False
    labels: Path | None = None
    doubles: float = 0.98
    against: float = 0.2
    select: int | None = None
    drop_against: bool = False
    output: Path | None = None
    reward: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class DataReport:
    """against and doubles name rows by their place in the data; kept: the rows that were chosen
    for `output`, of which `write_chosen` writes them."""

    lessons: Lessons
    where: list[str]
    against: list[int]  # rows, the least likely label first
    doubles: list[tuple[int, int, float]]
    kept: tuple[int, ...]
    written: int | None = None  # rows in `output`, which is not touched where there are none
    reward: FeatureReward | None = None  # where it was asked for

    def as_dict(self) -> dict[str, Any]:
        one, where = self.lessons, self.where
        return result_file(
            "features data",
            {
                "pairs": one.pairs,
                "tested": one.tested,
                "rate": one.rate,
                "length": {"z": one.length_z, "longer_chosen": one.longer_chosen},
                "predictors": [vars(predictor) for predictor in one.predictors],
                "features": [lesson.as_dict() for lesson in one.found],
                "against": [
                    {"where": where[i], "probability": float(one.probability[i])}
                    for i in self.against
                ],
                "doubles": [
                    {"where": [where[i], where[j]], "cosine": cosine}
                    for i, j, cosine in self.doubles
                ],
                "probability": [float(p) for p in one.probability],
                "written": self.written,
            },
        )

    def rows(self) -> list[dict[str, Any]]:
        """Flat, for a CSV."""
        rows = []
        for lesson in self.lessons.found:
            row = lesson.as_dict()
            for name in ("examples", "against", "contexts"):
                del row[name]
            row["follows"] = ":".join(map(str, row["follows"] or ()))
            row["words"] = " ".join(map(repr, row["words"]))
            rows.append(row)
        return rows


def features_data(
    config: RunConfig, asked: DataAsked, *, say: Say, progress: OnFill = lambda _: None
) -> DataReport:
    """What the pairs of a split reward and punish, which rows go against it, which are doubles.

    The reference's cache is read, and filled first where it lacks rows; the model runs for nothing
    else, but for `contexts`.
    Raises: DataError for too few pairs, ConfigError for a place that would be written over.
    """
    from fpo_mlx.judge import cover, lessons

    _check(config, asked)
    if asked.reward:
        _check_reward(config)
    need_features(config, "features data")
    job = open_job(config, say=say, need_sae=True)
    labels = read_labels(asked.labels, len(job.saes)) if asked.labels else ({},) * len(job.saes)
    pairs = read_pairs(job, asked.split, say)[: asked.limit]
    refs = CachedScores(reference_of(job, pairs, say, progress), pairs)
    x = lessons.pair_features(pairs, refs, [sae.n_features for sae in job.saes])
    try:
        found = lessons.learn(x, rate=asked.rate, folds=asked.folds)
    except ValueError as error:
        raise DataError(f"{config.data.data} ({asked.split}): {error}.") from error
    found = replace(found, found=tuple(_told(found.found, x, pairs, job, asked, labels, say)))
    against = [int(i) for i in np.argsort(found.probability, kind="stable")]
    against = [i for i in against if found.probability[i] < asked.against]
    doubles = cover.near_doubles(x.chosen.beside(x.rejected), asked.doubles)
    kept = _kept(asked, x, against, config.objective.top_k)
    reward = _reward(found, x, job) if asked.reward else None
    return DataReport(found, [pair.where for pair in pairs], against, doubles, kept, reward=reward)


def _check(config: RunConfig, asked: DataAsked) -> None:
    chosen = asked.select is not None or asked.drop_against
    if chosen and asked.output is None:
        raise ConfigError("--select and --drop-against write rows: give --output FOLDER.")
    if asked.output is not None and not chosen:
        raise ConfigError("--output: give --select N or --drop-against, or both.")
    if asked.output is not None and asked.limit is not None:
        raise ConfigError(
            f"--limit {asked.limit} with --output {asked.output}: the rows behind them would be "
            "missing there, as if they had been chosen against. Leave --limit out."
        )
    _claim(config, asked)


def _claim(config: RunConfig, asked: DataAsked) -> None:
    """Raises: ConfigError where the rows would be written over anything else."""
    if asked.output is not None:
        outputs.claim_folder(
            asked.output, "--output", CHOSEN, inputs=config.reads(), overwrite=asked.overwrite
        )


def _check_reward(config: RunConfig) -> None:
    """A reward is read with the plain model and SAE. Raises: ConfigError for what it would lack."""
    given = {**asdict(config.reference), **asdict(config.data), **asdict(config.train)}
    names = ("init_adapter", "chat_template", "chat_template_args", *named("sae_files"))
    lacking = [name for name in names if given[name] != default_of(options()[name])]
    if lacking:
        raise ConfigError(
            f"--save-reward with {', '.join('--' + n.replace('_', '-') for n in lacking)}: a "
            "reward reads answers with the model and the SAE as their files are. Fuse the adapter, "
            "put the template into the model's folder, or `sae convert` the SAE, and give that."
        )


def _told(
    found: Sequence[Lesson], x: PairFeatures, pairs: Sequence[TokenPair], job: Job,
    asked: DataAsked, labels: Sequence[Mapping[int, str]], say: Say,
) -> list[Lesson]:  # fmt: skip
    """Each with all that says what it is."""
    shown = _described(found, x, pairs, job, asked.examples)
    shown = [
        replace(
            one,
            label=labels[one.sae].get(one.feature, ""),
            link=link(job.saes[one.sae], one.feature),
        )
        for one in shown
    ]
    if asked.contexts:
        if len(shown) > CONTEXTS_OF:
            say(f"{len(shown)} features found; --contexts are of the strongest {CONTEXTS_OF}")
        shown[:CONTEXTS_OF] = _with_contexts(shown[:CONTEXTS_OF], job, pairs, asked.examples, say)
    return shown


def _described(
    found: Sequence[Lesson], x: PairFeatures, pairs: Sequence[TokenPair], job: Job, count: int
) -> list[Lesson]:
    """Each with its words and its examples for and against."""
    from fpo_mlx.judge import lessons

    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    presence = lessons.Presence.of(responses)

    def example(i: int, activations: np.ndarray) -> Example:
        chosen, rejected = (float(a) for a in activations[:, i])
        side = "rejected" if rejected > chosen else "chosen"
        text = job.tokenizer.decode(getattr(pairs[i], side).tolist(), skip_special=True)
        text = " ".join(text.split())[:SHOWN]
        return lessons.Example(pairs[i].where, chosen, rejected, text, side)

    def described(one: Lesson, sides: np.ndarray) -> Lesson:
        """sides: the feature in the chosen and rejected responses, [2, N]."""
        words = presence.words(sides.reshape(-1), WORDS)
        for_it, against = lessons.examples_of(sides[0] - sides[1], one.z, count)
        return replace(
            one,
            words=tuple(job.tokenizer.decode([token]) for token in words),
            examples=tuple(example(i, sides) for i in for_it),
            against=tuple(example(i, sides) for i in against),
        )

    columns = np.array([x.column(one.sae, one.feature) for one in found], dtype=np.int64)
    out = []
    for at in range(0, len(found), AT_ONCE):
        some = columns[at : at + AT_ONCE]
        block = np.stack([x.chosen.dense(some), x.rejected.dense(some)])  # [2, N, K]
        out += [described(one, block[:, :, i]) for i, one in enumerate(found[at : at + AT_ONCE])]
    return out


def _with_contexts(
    shown: Sequence[Lesson], job: Job, pairs: Sequence[TokenPair], count: int, say: Say
) -> list[Lesson]:
    """The tokens of the examples on which each feature fires; the model reads these alone."""
    from fpo_mlx.judge import feature_scan
    from fpo_mlx.model.reader import encoder_of

    by_place, policy = {pair.where: pair for pair in pairs}, tapped_policy(job, job.adapter, say)
    out: dict[tuple[int, int], Sequence[Context]] = {}
    for i, sae in enumerate(job.saes):
        own = [one for one in shown if one.sae == i]
        wanted = dict.fromkeys((e.where, e.side) for one in own for e in one.examples)
        texts = [
            Passage(pair.prompt, getattr(pair, side), f"{where}, {side}")
            for where, side in wanted
            if (pair := by_place[where])
        ]
        found = feature_scan.contexts(
            policy, encoder_of(sae), i, texts, [one.feature for one in own], max(count, 1),
            job.tokenizer.decode,
        )  # fmt: skip
        out |= {(i, feature): contexts for feature, contexts in found.items()}
    return [replace(one, contexts=out[one.sae, one.feature]) for one in shown]


def _reward(found: Lessons, x: PairFeatures, job: Job) -> FeatureReward:
    """The regression on all pairs, with all that reading an answer by it needs."""
    ref, fitted = job.config.reference, found.fitted
    names = [x.name(int(column)) for column in fitted.columns]
    accuracy = next(p.accuracy for p in found.predictors if p.name == "features")
    labels = {(one.sae, one.feature): one.label or "".join(one.words[:2]) for one in found.found}
    return FeatureReward(
        model=str(ref.model),
        model_fingerprint=job.identity.model,
        saes=tuple(
            (spec, sae.fingerprint(), sae.site.layer, sae.site.kind)
            for spec, sae in zip(ref.sae, job.saes, strict=True)
            if sae.site is not None
        ),
        features=tuple(
            (sae, feature, float(weight), labels.get((sae, feature), ""))
            for (sae, feature), weight in zip(names, fitted.weights, strict=True)
        ),
        pairs=found.pairs,
        held_out_accuracy=accuracy,
    )


def _kept(asked: DataAsked, x: PairFeatures, against: Sequence[int], top_k: int) -> tuple[int, ...]:
    """The rows that are to be written, in the order of the data."""
    from fpo_mlx.judge import cover

    gone = set(against) if asked.drop_against else set()
    left = [i for i in range(len(x)) if i not in gone]
    if asked.select is None or not left:
        return tuple(left)
    sides = [cover.strongest(side.take(np.array(left)), top_k) for side in (x.chosen, x.rejected)]
    sets = [np.union1d(a, b) for a, b in zip(*sides, strict=True)]
    return tuple(sorted(left[i] for i in cover.cover(sets, asked.select)))


def write_chosen(config: RunConfig, asked: DataAsked, report: DataReport, say: Say) -> DataReport:
    """The chosen rows as they stand in the data, with all their columns; the report says how many.

    Beside them what a share holds back, which no later share of these rows would find again.
    Nothing where none are left, or no `output` is asked for. Raises: ConfigError, FpoError where
    they cannot be written, for which the report is no worse.
    """
    if (output := asked.output) is None:
        return report
    if not report.kept:
        return replace(report, written=0)
    wanted, seen = {report.where[i] for i in report.kept}, set(report.where)
    records, rows, lost = [], 0, 0
    hub, names = hub_splits(config), columns(config)
    for row in data.iterate_raw(config.data.data, asked.split, hub, names):
        rows, lost = rows + 1, lost + (row.where not in seen)
        if row.where in wanted:
            records.append(row.record)
    _claim(config, asked)  # again: hours may lie between
    beside = _beside(config, asked.split, output)
    data.write_clean({asked.split: records, **beside}, output)
    if lost:
        say(f"too long to be looked at, so not in {output}: {lost} of {rows} rows")
    if beside:
        said = " and ".join(f"{len(rows)} rows of {name}" for name, rows in beside.items())
        say(
            f"{output} has the {said} as they are, too, by --valid-share "
            f"{config.data.valid_share:g}: leave the share out of what reads that folder"
        )
    ours = {asked.split, *beside}
    others = [path.name for path in files.listed(output, "*.jsonl") if path.stem not in ours]
    if others:
        say(f"{output} holds {', '.join(others)} of another time as well; they were left alone")
    return replace(report, written=len(records))


def _beside(config: RunConfig, split: str, output: Path) -> dict[str, list[Any]]:
    """With a share the rows of all other splits, but for those that the folder has already."""
    if not config.data.valid_share:
        return {}
    hub, names = hub_splits(config), columns(config)
    found = {}
    for other in data.find_splits(config.data.data, hub):
        if other != split and not (output / f"{other}.jsonl").exists():
            rows = data.iterate_raw(config.data.data, other, hub, names)
            found[other] = [row.record for row in rows if not row.fault]
    return found
