"""Rounds of answer, judge, build and train; every step's file is there once or not at all."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fpo_mlx.config import RunConfig, load_config, load_section
from fpo_mlx.errors import ConfigError, DataError, FpoError, Interrupted
from fpo_mlx.intervals import of_groups
from fpo_mlx.pairs.labels import by_prompt, labels_of
from fpo_mlx.pairs.prompts import check_prompts, shared_prompts
from fpo_mlx.pairs.records import (
    HUMAN,
    CandidateFile,
    Candidates,
    open_candidates,
    read_verdicts,
)
from fpo_mlx.pairs.settings import BuildConfig, GenerateConfig, JudgeConfig, RoundsConfig
from fpo_mlx.pipeline.job import Say, check_sae_named, open_saes
from fpo_mlx.pipeline.pairs_build import ABOUT, TooFewPairs, pairs_build
from fpo_mlx.pipeline.pairs_generate import pairs_generate
from fpo_mlx.pipeline.pairs_judge import check_judge, pairs_judge
from fpo_mlx.pipeline.report import verdict
from fpo_mlx.pipeline.rounds_settings import same_settings
from fpo_mlx.pipeline.train import Stop, Stopping, train
from fpo_mlx.pipeline.wins import SIDES, unjudged
from fpo_mlx.records import ROUND_FILE
from fpo_mlx.storage import files, lines, outputs
from fpo_mlx.storage.hub import read_config, resolve_model
from fpo_mlx.train.events import Report

Show = Callable[[Report], None]
DONE = ROUND_FILE
DRIFT = "logps_per_token/chosen_change"


@dataclass(frozen=True)
class Round:
    """win_rate: held-out answers against those of the round before, a tie half; 95 % interval."""

    number: int
    pairs: int
    longer_share: float | None
    score_chosen: float
    score_rejected: float
    win_rate: float
    interval: tuple[float, float]
    tokens: float  # mean length of a held-out answer
    drift: float | None  # of the chosen answers' log-prob, nats per token, at the end of training

    @property
    def lost(self) -> bool:
        return self.interval[1] < 0.5


def rounds(
    path: Path, *, say: Say, show: Show = lambda report: None,
    stopping: Stopping = lambda: nullcontext(lambda: lambda: None),
) -> list[Round]:  # fmt: skip
    """Run the rounds that the YAML file describes; a stopped run goes on at the step it was in.

    They end early when the held-out win rate's interval is not above 50 %, drift passes max_drift,
    or a round after the first has too few pairs. show: gets each report of a training. stopping:
    ends a round's training after the update in work, all of it saved.

    Raises: ConfigError, Interrupted, and whatever the steps raise.
    """
    settings = load_section(RoundsConfig, {}, path)
    parts = _check(settings, say)
    root, found = Path(settings.output), []
    same_settings(root, settings, say)
    held_out = _answers(settings, root / "round-0", None, settings.held_out, "held-out", say)
    adapter: Path | None = None
    for number in range(1, settings.rounds + 1):
        folder = root / f"round-{number}"
        say(f"--- round {number} of {settings.rounds}, in {folder}")
        training = partial(_train, say=say, show=show, stopping=stopping)
        try:
            one = _round(settings, parts, number, folder, adapter, held_out, say, training)
        except TooFewPairs as error:
            if not found:
                raise
            say(f"round {number - 1} is the last: the next one has too few pairs. {error}")
            break
        found.append(one)
        adapter, held_out = folder / "adapters", folder / "held-out.jsonl"
        if why := _end(one, settings):
            say(f"round {number} is the last: {why}")
            break
    files.write_json(root / "rounds.json", [asdict(one) for one in found])
    return found


def _check(settings: RoundsConfig, say: Say) -> tuple[JudgeConfig, BuildConfig]:
    """Every section, and all that it names, is looked at before the first step."""
    _generate(settings, None, settings.prompts, 0)
    training = _training(settings, Path("data"), Path("adapters"), None)
    check_sae_named(training)
    judge = load_section(JudgeConfig, settings.judge)
    build = load_section(BuildConfig, settings.build)
    if build.valid_share and (share := training.data.valid_share):
        raise ConfigError(
            f"train: valid_share {share:g}: found that build holds {build.valid_share:g} of the "
            "prompts back itself. Leave it out, or add `valid_share: 0` to build."
        )
    for prompts in (settings.prompts, settings.held_out):
        check_prompts(Path(prompts))
    _check_held_out(Path(settings.held_out), Path(settings.prompts), say)
    check_judge(judge)
    model = read_config(resolve_model(settings.model))
    open_saes(training, model, say=say)
    return judge, build


def _check_held_out(held_out: Path, prompts: Path, say: Say) -> None:
    """A win rate on prompts that were trained on says little. Raises: ConfigError of one file."""
    if outputs.same_place(held_out, prompts):
        raise ConfigError(
            f"held_out {held_out} is the file of prompts itself, so each round would be measured "
            "on what it was trained on. Wanted a file of other prompts."
        )
    both, count = shared_prompts(held_out, prompts)
    if both:
        say(
            f"warning: {both} of the {count} prompts of {held_out} are among those of {prompts}, "
            "which are trained on: on these a win rate says little. Take them out of one file"
        )


def _round(
    settings: RoundsConfig, parts: tuple[JudgeConfig, BuildConfig], number: int, folder: Path,
    adapter: Path | None, before: Path, say: Say, training: Callable[[RunConfig], None],
) -> Round:  # fmt: skip
    if (folder / DONE).exists():
        record = files.parse_json((folder / DONE).read_text(encoding="utf-8"))
        return Round(**{**record, "interval": tuple(record["interval"])})
    judge, build = parts
    candidates = _answers(settings, folder, adapter, settings.prompts, "candidates", say, number)
    verdicts = folder / "verdicts.jsonl"
    asked = replace(judge, keep_cut=judge.keep_cut or build.keep_cut)
    judged = pairs_judge(asked, candidates=candidates, output=verdicts, say=say)
    if not (folder / "pairs" / ABOUT).exists():
        build = replace(build, judge_name=build.judge_name or judged.judge)
        pairs_build(
            build, candidates=candidates, verdicts=[verdicts], output=folder / "pairs", say=say
        )
    about = files.parse_json((folder / "pairs" / ABOUT).read_text(encoding="utf-8"))
    data = _with_old(settings, number, folder)
    start = adapter if settings.start == "previous" else None
    training(_training(settings, data, folder / "adapters", start))
    drift = _drift(folder / "adapters")
    after = _answers(settings, folder, folder / "adapters", settings.held_out, "held-out", say)
    win_rate, interval = _against(before, after, judge, folder, say)
    done = Round(
        number, about["pairs"], about["longer_share"], about["mean_score_chosen"],
        about["mean_score_rejected"], win_rate, interval, _mean_tokens(after), drift,
    )  # fmt: skip
    files.write_json(folder / DONE, asdict(done))
    say(
        f"round {number}: wins {win_rate:.0%} [{interval[0]:.0%}, {interval[1]:.0%}] of the "
        "held-out comparisons with the round before"
    )
    return done


def _generate(
    settings: RoundsConfig, adapter: Path | None, prompts: str, number: int
) -> GenerateConfig:
    """Each round draws new answers; held-out ones (number 0) have the same noise in every round."""
    given = {"model": settings.model, "prompts": prompts, **settings.generate}
    given |= {"adapter_path": str(adapter)} if adapter else {}
    found = load_section(GenerateConfig, given)
    return replace(found, seed=found.seed + number)


def _answers(
    settings: RoundsConfig, folder: Path, adapter: Path | None, prompts: str, name: str, say: Say,
    number: int = 0,
) -> Path:  # fmt: skip
    output = folder / f"{name}.jsonl"
    pairs_generate(_generate(settings, adapter, prompts, number), output=output, say=say)
    return output


def _training(settings: RoundsConfig, data: Path, adapter: Path, start: Path | None) -> RunConfig:
    from fpo_mlx.train.checkpoint import run_folder

    given: dict[str, Any] = {**settings.train, "model": settings.model, "data": str(data)}
    given |= {"adapter_path": str(adapter), **run_folder(adapter).going_on()}
    given |= {"init_adapter": str(start)} if start else {}
    return load_config(given)


def _train(config: RunConfig, say: Say, show: Show, stopping: Stopping) -> None:
    """Raises: Interrupted where it was asked to stop, though it may have been at its end."""
    asked: list[Stop] = []

    def install() -> Stop:
        asked.append(install_stop())
        return asked[0]

    with stopping() as install_stop:
        try:
            for report in train(config, say=say, install_stop=install):
                show(report)
            code = next((stop() for stop in asked), None)
        except Interrupted as stopped:
            code = stopped.exit_code
    if code:
        raise Interrupted(
            f"stopped in training; everything is in {config.train.adapter_path}. The same command "
            "goes on.",
            code,
        )
    for line in verdict(Path(config.train.adapter_path), commands=False):
        say(line)


def _drift(adapter: Path) -> float | None:
    """The last one that its training reported, in this sitting or one before."""
    log = adapter / "metrics.jsonl"
    drift = None
    for number, _, line in lines.read_lines(log) if log.exists() else ():
        record = lines.decode(line, f"{log}:{number}")
        metrics = record.get("metrics", record)
        if isinstance(metrics, Mapping) and DRIFT in metrics:
            found = metrics[DRIFT]  # null where it was no finite number
            drift = math.inf if found is None else float(found)
    return drift


def _with_old(settings: RoundsConfig, number: int, folder: Path) -> Path:
    """The round's pairs, with some of earlier rounds where they are asked for; none of a prompt
    that this one holds back."""
    if not settings.keep_old or number == 1:
        return folder / "pairs"
    data = folder / "data"
    if not (data / "train.jsonl").exists():
        parts = (folder / "pairs" / f"{name}.jsonl" for name in ("valid", "test"))
        held = {_id(line) for part in parts if part.exists() for line in _rows(part)}
        old: list[bytes] = []
        for earlier in range(1, number):
            path = folder.parent / f"round-{earlier}" / "pairs" / "train.jsonl"
            old += (pair for pair in _pairs(_rows(path)) if _id(pair) not in held)
        kept = random.Random(number).sample(old, min(settings.keep_old, len(old)))
        with files.atomic_folder(data) as work:
            for part in files.listed(folder / "pairs", "*.jsonl"):
                (work / part.name).write_bytes(part.read_bytes())
            with open(work / "train.jsonl", "ab") as out:
                out.writelines(kept)
    return data


def _rows(path: Path) -> list[bytes]:
    return [line for _, _, line in lines.read_lines(path)]


def _id(rows: bytes) -> str:
    """The prompt of a pair's lines."""
    return str(json.loads(rows.split(b"\n", 1)[0]).get("id"))


def _pairs(rows: Sequence[bytes]) -> list[bytes]:
    """The lines of each pair: one, or the two of a reward-augmented one."""
    size = 2 if rows and "wanted" in json.loads(rows[0]).get("from", {}) else 1
    return [b"".join(rows[at : at + size]) for at in range(0, len(rows), size)]


def _mean_tokens(answers: Path) -> float:
    """Of the model's own; a person's may have come with the prompts."""
    found = (c for one in open_candidates(answers) for c in one.candidates)
    return fmean(c.tokens for c in found if c.model != HUMAN)


def _in_both(one: CandidateFile, two: CandidateFile, say: Say) -> list[str]:
    """Prompts of both; all of each, unless the file of held-out ones was changed meanwhile."""
    both = [id for id in one.offsets if id in two.offsets]
    if not both:
        raise DataError(
            f"{one.path} and {two.path} have no prompt in common, so the rounds cannot be "
            "compared: the held-out prompts were changed. Put those of before back; the same "
            "command goes on."
        )
    if lost := len({*one.offsets, *two.offsets}) - len(both):
        say(f"{lost} held-out prompts were answered in one of the two rounds only: not compared")
    return both


def _against(
    before: Path, after: Path, judge: JudgeConfig, folder: Path, say: Say
) -> tuple[float, tuple[float, float]]:
    """Win rate of `after` over `before`, answers with the same noise; its interval by prompt."""
    one, two = open_candidates(before), open_candidates(after)
    versus, sides = folder / "versus.jsonl", {}
    with lines.LineWriter(versus) as writer:
        there = set(open_candidates(versus).offsets)
        for id in _in_both(one, two, say):
            made = [[c for c in f.get(id).candidates if c.model != HUMAN] for f in (one, two)]
            for n, answers in enumerate(zip(*made, strict=True)):
                name = f"{id}-{n}"
                sides[name] = unjudged(*(answer.text for answer in answers))
                if name not in there:
                    writer.append(Candidates(name, one.get(id).prompt, answers).as_dict())
    verdicts = folder / "versus-verdicts.jsonl"
    # no answer of a person's is among them, and all that both said counts
    judge = replace(judge, against_reference=False, keep_cut=True)
    asked = pairs_judge(judge, candidates=versus, output=verdicts, say=say).judge
    found = (v for v in read_verdicts(verdicts).values() if v.judge == asked)
    for name, group in by_prompt(found).items():
        for label in labels_of(group):
            sides[name] = SIDES.get(label.verdict, 0)
    prompts: dict[str, list[float]] = {}
    for name, side in sides.items():  # the later answer is b
        prompts.setdefault(name.rsplit("-", 1)[0], []).append((1 - side) / 2)
    means = [fmean(found) for found in prompts.values()]
    return fmean(means), of_groups(means, max(map(len, prompts.values())))


def _end(one: Round, settings: RoundsConfig) -> str:
    """Why no round comes after this one; nothing if one may."""
    bound, drift = settings.max_drift, one.drift
    if bound is not None and drift is not None and abs(drift) > bound:
        return f"drift {drift:+.3g} nats per token is over max_drift {bound:g}"
    other, better = "the round before", "whose adapters are the better ones"
    if one.number == 1:
        other, better = "the model itself", "which is the better one"
    if one.lost:
        return f"its answers lose to those of {other}, {better}"
    if one.interval[0] <= 0.5:
        return f"its answers are not told from those of {other} (50 % is in the interval)"
    return ""


def rounds_report(root: Path, say: Say) -> Path | None:
    """One page over the adapters of all rounds; None, and why, where it cannot be made."""
    from fpo_mlx.pipeline.report import report

    try:
        return report([root], root / "report.html")
    except FpoError as error:
        say(f"no page of the rounds: {error}")
        return None
