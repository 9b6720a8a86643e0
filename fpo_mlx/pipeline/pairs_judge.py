"""Verdicts on candidates: by a local model, an endpoint, or a reward function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fpo_mlx.errors import ConfigError, DataError, ModelError
from fpo_mlx.pairs import question
from fpo_mlx.pairs.endpoint import Endpoint
from fpo_mlx.pairs.labels import comparisons
from fpo_mlx.pairs.records import (
    HUMAN,
    CandidateFile,
    Candidates,
    Key,
    Verdict,
    on_these,
    open_candidates,
    read_verdicts,
)
from fpo_mlx.pairs.reward import Reward
from fpo_mlx.pairs.reward import judge_name as reward_name
from fpo_mlx.pairs.settings import JudgeConfig
from fpo_mlx.pairs.summary import JudgeSummary, summarise
from fpo_mlx.pipeline.feature_reward import open_reward, read_reward
from fpo_mlx.pipeline.job import Say
from fpo_mlx.reference.weights import model_fingerprint
from fpo_mlx.storage.files import sha256_of
from fpo_mlx.storage.hub import at_hand, read_config, resolve_model
from fpo_mlx.storage.lines import LineWriter

IN_A_ROW = 10  # replies that say nothing, before that is told
Task = tuple[int, int, str]  # a, b, order
Judge = Callable[[Candidates, list[Task]], Iterator[Verdict]]


@dataclass(frozen=True)
class JudgeReport:
    """judges: figures over all verdicts that count in the file, by judge."""

    written: int
    before: int
    judges: dict[str, JudgeSummary]
    judge: str  # the name of this one

    def as_dict(self) -> dict[str, Any]:
        judges = {name: summary.as_dict() for name, summary in self.judges.items()}
        return {"written": self.written, "before": self.before, "judges": judges}


def pairs_judge(
    settings: JudgeConfig,
    *,
    candidates: Path,
    output: Path,
    against: Path | None = None,
    say: Say,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> JudgeReport:
    """Judge every comparison that has no verdict of this judge yet.

    A model or an endpoint sees both orders; a reward function scores each answer once. What an
    endpoint said and could not be read is asked again. against: a file of a person's votes to
    compare with. progress: prompts done, prompts in all. Cut answers are not judged, but by a
    reward, unless the settings say so.

    Raises: ConfigError, DataError, ModelError; FpoError when an endpoint stays silent.
    """
    found = open_candidates(candidates)
    if not len(found):
        raise DataError(f"{candidates} holds no candidates. Run `fpo-mlx pairs generate` first.")
    known = read_verdicts(output) if output.exists() else {}
    done = _done(known, settings)
    votes = read_verdicts(against).values() if against else ()
    written, cut, watch = 0, 0, _Watch(settings, say)
    with ExitStack() as stack:
        writer = stack.enter_context(LineWriter(output))
        name, orders, judge = _open(settings, output, found, say, stack)
        for number, one in enumerate(found, start=1):
            tasks = [(a, b, order) for a, b in _compared(one, settings) for order in orders]
            tasks = [task for task in tasks if not _judged(one, task, name, done)]
            found_now = judge(one, tasks) if tasks else ()
            made = (replace(v, texts=one.texts(v.a, v.b)) for v in found_now)
            # what a request or a question costs is kept at once, a reward's verdicts per prompt
            for group in [list(made)] if settings.reward else ([verdict] for verdict in made):
                new = [v for v in group if v.verdict != "unreadable" or v.key not in known]
                writer.append(*(verdict.as_dict() for verdict in new))
                watch(group)
                written += len(new)
            progress(number, len(found))
            cut += 0 if _with_cut(settings) else sum(c.cut for c in one.candidates)
    if cut:
        say(
            f"{cut} answers were cut at --max-tokens and are not judged, since `pairs build` leaves"
            " them out; --keep-cut, there too (in a file of rounds `build: {keep_cut: true}`), "
            "takes them in"
        )
    return JudgeReport(written, len(done), judges_of(output, found, votes), name)


def _done(found: Mapping[Key, Verdict], settings: JudgeConfig) -> set[Key]:
    """What is not judged again. A model says the same again, an endpoint may have been mended."""
    again = bool(settings.judge_url)
    return {key for key, v in found.items() if not (again and v.verdict == "unreadable")}


def _with_cut(settings: JudgeConfig) -> bool:
    """A reward costs next to nothing."""
    return settings.keep_cut or settings.reward is not None


def _compared(one: Candidates, settings: JudgeConfig) -> list[tuple[int, int]]:
    return comparisons(
        one, neighbours=settings.compare == "neighbours", human=_human(one),
        against_reference=settings.against_reference, cut=_with_cut(settings),
    )  # fmt: skip


class _Watch:
    """Says once, while there is time, that a judge's replies cannot be read."""

    def __init__(self, settings: JudgeConfig, say: Say) -> None:
        self._url, self._say = settings.judge_url, say
        self._row, self._told = 0, False

    def __call__(self, group: Iterable[Verdict]) -> None:
        for verdict in group:
            self._row = self._row + 1 if verdict.verdict == "unreadable" else 0
            if self._row == IN_A_ROW and not self._told:
                self._told = True
                self._tell(verdict)

    def _tell(self, last: Verdict) -> None:
        hint = "take another judge"
        if self._url:
            hint = (
                "if it thinks first, switch that off where it is served (Qwen3: a line /no_think "
                "in --criteria); the same command asks these again"
            )
        if self._url and last.raw.startswith("HTTP "):
            hint = "its context may be too short for these questions"
        self._say(
            f"warning: {IN_A_ROW} replies of {last.judge} in a row are neither A nor B, the last: "
            f"{last.raw[:100]!r}. Stop with Ctrl-C and mend that: {hint}"
        )


def check_judge(settings: JudgeConfig) -> None:
    """What the settings name is there, a reward's function too. Raises: ConfigError, FpoError."""
    if settings.reward and settings.reward.endswith(".json"):
        read_reward(Path(settings.reward))
    elif settings.reward:
        with _function(settings):  # which imports the file
            pass
    else:
        question.read_criteria(settings.criteria)
    if settings.judge:
        resolve_model(settings.judge)


def judges_of(
    verdicts: Path, found: CandidateFile, votes: Iterable[Verdict] = ()
) -> dict[str, JudgeSummary]:
    """Figures of every judge in a file of verdicts."""
    known = on_these(found, read_verdicts(verdicts).values())
    votes = on_these(found, votes)
    return summarise(known, lambda id: [c.tokens for c in found.get(id).candidates], votes)


def _judged(one: Candidates, task: Task, name: str, done: Container[Key]) -> bool:
    """Whether these two answers have this judge's verdict, or one that does not name its texts."""
    a, b, _ = task
    return any((one.id, *task, name, texts) in done for texts in (one.texts(a, b), None))


def _human(one: Candidates) -> int | None:
    return next((n for n, c in enumerate(one.candidates) if c.model == HUMAN), None)


def _open(
    settings: JudgeConfig, output: Path, found: CandidateFile, say: Say, stack: ExitStack
) -> tuple[str, tuple[str, ...], Judge]:
    """The judge's name, the orders it sees, and what judges one prompt's comparisons."""
    if settings.reward:
        return open_rewarder(settings, say, stack)
    criteria = question.read_criteria(settings.criteria)
    if settings.judge_url:
        model = str(settings.judge_model)
        _announce(settings, found, say)
        endpoint = Endpoint(
            settings.judge_url, model, output.with_name(f"{output.name}.requests"),
            settings.key_variable, settings.timeout, settings.retries,
        )  # fmt: skip
        stack.callback(endpoint.close)
        name = question.judge_name(model, endpoint.url, criteria)
        return name, ("ab", "ba"), _by_endpoint(endpoint, criteria, name)
    path = resolve_model(str(settings.judge))
    name = question.judge_name(str(settings.judge), model_fingerprint(path), criteria)
    _warn_of_kin(path, found, say)
    return name, ("ab", "ba"), _by_model(path, settings.trust_remote_code, criteria, name)


def open_rewarder(
    settings: JudgeConfig, say: Say, stack: ExitStack
) -> tuple[str, tuple[str, ...], Judge]:
    """The same of --reward, of which there has to be one."""
    spec = str(settings.reward)
    if spec.endswith(".json"):
        return _by_features(Path(spec), settings, say)
    reward = stack.enter_context(_function(settings))
    return reward_name(spec), ("none",), _by_reward(reward, settings)


def _function(settings: JudgeConfig) -> Reward:
    return Reward(str(settings.reward), timeout=settings.timeout, memory_gb=settings.memory_gb)


def _announce(settings: JudgeConfig, found: CandidateFile, say: Say) -> None:
    """What leaves this machine, before it does."""
    host = urlsplit(str(settings.judge_url)).hostname
    local = host in ("localhost", "127.0.0.1", "::1")
    say(
        f"the prompts and answers of {found.path} go to {host}"
        + ("" if local else ", which is not this machine")
        + f", with the key in {settings.key_variable} if there is one; nothing else does"
    )


def _by_reward(reward: Reward, settings: JudgeConfig) -> Judge:
    name = reward_name(str(settings.reward))

    def judge(one: Candidates, tasks: list[Task]) -> Iterator[Verdict]:
        numbers, texts = _answers(one, tasks)
        found = reward.scores(one.prompt.text, texts, f"id {one.id}")
        scores = dict(zip(numbers, found, strict=True))
        for a, b, order in tasks:
            yield _by_score(one, (a, b, order), name, scores[a], scores[b])

    return judge


def _by_features(path: Path, settings: JudgeConfig, say: Say) -> tuple[str, tuple[str, ...], Judge]:
    """A regression of `features data`: the verdicts say which features decided."""
    reward = read_reward(path)
    score = open_reward(reward, path, trust_remote_code=settings.trust_remote_code, say=say)
    name = f"features:{sha256_of(path)[:8]}"

    def judge(one: Candidates, tasks: list[Task]) -> Iterator[Verdict]:
        numbers, texts = _answers(one, tasks)
        found = score(one.prompt.turns, one.prompt.tools, texts)
        parts = {n: reward.parts(s) for n, s in zip(numbers, found, strict=True)}
        for a, b, order in tasks:
            x, y = float(parts[a].sum()), float(parts[b].sum())
            made = _by_score(one, (a, b, order), name, x, y)
            p, why = 1 / (1 + math.exp(min(y - x, 700.0))), reward.why(parts[a] - parts[b])
            yield replace(made, p=p, raw=why)

    return name, ("none",), judge


def _answers(one: Candidates, tasks: list[Task]) -> tuple[list[int], list[str]]:
    """The answers that are compared, each once: their numbers and texts."""
    numbers = sorted({n for a, b, _ in tasks for n in (a, b)})
    return numbers, [one.candidates[n].text for n in numbers]


def _by_score(one: Candidates, task: Task, name: str, x: float, y: float) -> Verdict:
    """The higher score of the two wins."""
    side = "tie" if x == y else "a" if x > y else "b"
    return Verdict(one.id, *task, side, name, score_a=x, score_b=y, time=time.time())


def _by_endpoint(endpoint: Endpoint, criteria: str, name: str) -> Judge:
    def judge(one: Candidates, tasks: list[Task]) -> Iterator[Verdict]:
        for a, b, order in tasks:
            asked = question.messages(one, *_shown(a, b, order), criteria)
            first, raw = endpoint.ask(asked, question.read_reply)
            yield question.verdict(one.id, a, b, order, name, first, raw, time.time())

    return judge


def _by_model(path: Path, trust_remote_code: bool, criteria: str, name: str) -> Judge:
    import numpy as np

    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.judge.choice import letter_masses
    from fpo_mlx.model.load import load_model

    tokenizer = load_tokenizer(
        path, template_kwargs=question.AT_ONCE, trust_remote_code=trust_remote_code
    )
    letters = [_spellings(tokenizer, letter) for letter in question.LETTERS]
    model = load_model(path, trust_remote_code=trust_remote_code).model

    def judge(one: Candidates, tasks: list[Task]) -> Iterator[Verdict]:
        for a, b, order in tasks:
            asked = question.messages(one, *_shown(a, b, order), criteria)
            tokens = np.array(tokenizer.prompt_tokens(asked), dtype=np.int32)
            masses = letter_masses(model, tokens, letters)
            first = question.first_of_masses(*masses)
            raw = " ".join(f"{mass:.4f}" for mass in masses)
            yield question.verdict(one.id, a, b, order, name, first, raw, time.time())

    return judge


def _shown(a: int, b: int, order: str) -> tuple[int, int]:
    return (a, b) if order == "ab" else (b, a)


def _spellings(tokenizer: Any, letter: str) -> list[int]:
    """Tokens that spell the letter alone, with and without a space. Raises: ConfigError."""
    spelled = [tokenizer.text_tokens(text) for text in (letter, f" {letter}")]
    ids = sorted({tokens[0] for tokens in spelled if len(tokens) == 1})
    if not ids:
        raise ConfigError(f"--judge: its tokenizer has no token for {letter!r}; use another judge.")
    return ids


def _warn_of_kin(path: Path, found: CandidateFile, say: Say) -> None:
    """A judge prefers what sounds like itself."""
    said = {c.model.split(" + ")[0] for c in next(iter(found)).candidates} - {HUMAN, ""}
    kind = read_config(path).get("model_type")
    for model in sorted(said):
        there = at_hand(model)
        try:
            other = read_config(there).get("model_type") if there else None
        except ModelError:  # it is a warning's sake
            continue
        if kind and kind == other:
            say(
                f"warning: judge and {model} are of one family ({kind}); judges prefer answers "
                "like their own. Compare with a person's votes (`pairs rate`, --against)."
            )
