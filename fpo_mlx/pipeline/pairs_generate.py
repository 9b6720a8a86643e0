"""Answers to prompts, several to each, as candidates for pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.config import Sampling
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs import prompts as asking
from fpo_mlx.pairs.augment import with_score
from fpo_mlx.pairs.records import (
    HUMAN,
    Candidate,
    CandidateFile,
    Candidates,
    Prompt,
    open_candidates,
    prompt_id,
)
from fpo_mlx.pairs.settings import GenerateConfig
from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.origins import warn_of_origin
from fpo_mlx.pipeline.prepared import longest, tokenizer_of
from fpo_mlx.storage.hub import resolve_model
from fpo_mlx.storage.lines import LineWriter

if TYPE_CHECKING:
    import mlx.nn as nn

    from fpo_mlx.judge.slots import Answer

WINDOW = 512  # prompts that are sorted by length and answered together


@dataclass(frozen=True)
class GenerateReport:
    """prompts: written now; before: found in the file; cut: answers that ended by length."""

    prompts: int
    before: int
    answers: int
    cut: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _Waiting:
    """A prompt of the window in work."""

    id: str
    prompt: Prompt
    tokens: Any  # int32 [P]
    known: bool = False  # it has its candidates already


def pairs_generate(
    settings: GenerateConfig,
    *,
    output: Path,
    say: Say,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> GenerateReport:
    """Answer every prompt n times; what `output` already holds is not made again.

    The answers depend on the seed, the prompt and the answer's number alone, so a run that was
    killed and goes on writes the same file. progress: answers so far, answers per second.

    Raises: ConfigError, DataError, ModelError; FpoError when the file cannot be written.
    """
    path = _inputs(settings)
    adapter, template = settings.adapter_path, settings.chat_template
    arguments = settings.chat_template_args
    warn_of_origin([adapter], settings.model, path, template, say, arguments)
    there = open_candidates(output) if output.exists() else CandidateFile(output)
    done = set(there.offsets)
    tokenizer = _tokenizer(path, settings, say)
    _lengths(settings, tokenizer, done, say)
    _warn_of_others(settings, there, say)
    with LineWriter(output) as writer:
        model = _open(path, settings, say)
        counts, begun = {"prompts": 0, "answers": 0, "cut": 0, "tokens": 0}, time.monotonic()
        for found in _all(model, tokenizer, settings, done, say):
            writer.append(found.as_dict())
            made = [c for c in found.candidates if c.model != HUMAN]
            counts["prompts"] += 1
            counts["answers"] += len(made)
            counts["cut"] += sum(c.cut for c in made)
            counts["tokens"] += sum(c.tokens for c in made)
            progress(counts["answers"], counts["answers"] / (time.monotonic() - begun))
    return GenerateReport(before=len(done), seconds=time.monotonic() - begun, **counts)


def need_inputs(settings: GenerateConfig) -> tuple[str, Path]:
    """--model and --prompts. Raises: ConfigError where one of them says nothing."""
    if not settings.model or not settings.prompts:
        missing = "--model" if not settings.model else "--prompts"
        raise ConfigError(f"{missing} is missing: wanted a model and a file of prompts.")
    return settings.model, Path(settings.prompts)


def _inputs(settings: GenerateConfig) -> Path:
    """The model's folder; every line of the prompts is looked at before it is loaded."""
    model, prompts = need_inputs(settings)
    path = resolve_model(model)
    asking.check_prompts(prompts)
    return path


def _tokenizer(path: Path, settings: GenerateConfig, say: Say) -> ChatTokenizer:
    template, variables = settings.chat_template, settings.chat_template_args
    return tokenizer_of(path, template, variables, settings.trust_remote_code, say)


def prompt_lengths(settings: GenerateConfig, path: Path, say: Say) -> list[int]:
    """Tokens of each prompt. path: the model's folder. Raises: as `pairs_generate` does."""
    return _lengths(settings, _tokenizer(path, settings, say), set(), say)


def _lengths(
    settings: GenerateConfig, tokenizer: ChatTokenizer, done: set[str], say: Say
) -> list[int]:
    """Tokens of each prompt that has no answers yet. Raises: DataError with all that have no room
    or that the template refuses; an answer may be hours from the first."""
    lengths: dict[str, int] = {}
    faults: list[str] = []
    most = longest(settings.max_seq_length, tokenizer, say)
    room = most - settings.max_tokens
    for window in asking.windows(_asked(settings), WINDOW):
        found = _rendered(window, tokenizer, faults)
        new = {id: one for id, one in found.items() if id not in done and id not in lengths}
        encoded = tokenizer.encode([text for _, text in new.values()]) if new else []
        for (id, (prompt, _)), tokens in zip(new.items(), encoded, strict=True):
            lengths[id] = len(tokens)
            if not 1 <= len(tokens) <= room:
                faults.append(f"{len(tokens)} tokens: {prompt.text[:80]!r}")
    if faults:
        raise DataError(
            f"{settings.prompts}: {len(faults)} prompts cannot be asked. --max-seq-length {most} "
            f"with --max-tokens {settings.max_tokens} leaves room for {room} tokens. Shorten them, "
            "leave them out, or change these settings.",
            faults,
        )
    return list(lengths.values())


def _warn_of_others(settings: GenerateConfig, there: CandidateFile, say: Say) -> None:
    """Of answers that are there and were made otherwise: they are not made again."""
    first = next((c for one in there for c in one.candidates if c.model != HUMAN), None)
    if first is None:
        return
    now = {"model": _name(settings), "temp": settings.temp, "seed": settings.seed}
    was = {name: getattr(first, name) for name in now}
    other = [f"{name} {was[name]}, now {now[name]}" for name in now if was[name] != now[name]]
    if other:
        say(
            f"warning: {there.path} was begun otherwise ({'; '.join(other)}); those answers stay, "
            "and only prompts without any are asked. Name another --output for answers of one kind"
        )
    fewer = sum(_own(one) < settings.n for one in there)
    if fewer:
        say(
            f"warning: {fewer} of {len(there)} prompts in {there.path} have fewer answers than "
            f"--n {settings.n}; they get no more. Name another --output for so many of each"
        )
    answers = (c for one in there for c in one.candidates)
    cut = next((c for c in answers if _may_be_longer(c, settings)), None)
    if cut is not None:
        say(
            f"warning: {there.path} holds answers that were cut at {cut.tokens} tokens; they stay, "
            f"and --max-tokens {settings.max_tokens} makes none of them longer. Name another "
            "--output for answers that may be"
        )


def _own(one: Candidates) -> int:
    """Answers that a model made."""
    return sum(c.model != HUMAN for c in one.candidates)


def _may_be_longer(one: Candidate, settings: GenerateConfig) -> bool:
    return one.finish == "length" and one.tokens < settings.max_tokens


def _name(settings: GenerateConfig) -> str:
    """As candidates have it."""
    return settings.model + (f" + {settings.adapter_path}" if settings.adapter_path else "")


def _asked(settings: GenerateConfig) -> Iterator[Prompt]:
    for prompt in asking.read_prompts(Path(settings.prompts)):
        score = settings.score_in_prompt
        yield prompt if score is None else with_score(prompt, score)


def _all(
    model: nn.Module, tokenizer: ChatTokenizer, settings: GenerateConfig, done: set[str], say: Say
) -> Iterator[Candidates]:
    seen: set[str] = set()
    for window in asking.windows(_asked(settings), WINDOW):
        rendered = _rendered(window, tokenizer, [])
        new = {id: found for id, found in rendered.items() if id not in seen}
        if done and not seen and not new.keys() & done:
            say(
                f"warning: none of the first {len(new)} prompts is among the {len(done)} that have "
                "answers already. If they are the same prompts, the chat template, its arguments "
                "or --score-in-prompt has changed, and they are answered again"
            )
        seen |= new.keys()
        if new.keys() <= done:
            continue  # nothing of it is tokenized: a run that goes on starts at once
        waiting = _waiting(new, done, tokenizer)
        yield from answer_window(model, tokenizer, settings, waiting)
    if seen <= done:
        say("every prompt has answers already")


def _rendered(
    window: Sequence[Prompt], tokenizer: ChatTokenizer, faults: list[str]
) -> dict[str, tuple[Prompt, str]]:
    """By id each prompt and its text as the model gets it; the first of equal ones.

    faults: of prompts that the template refuses, to which these are added.
    """
    found: dict[str, tuple[Prompt, str]] = {}
    for prompt in window:
        try:
            text = tokenizer.render(prompt.turns, prompt.tools, prompt=True)
        except DataError as fault:
            faults.append(f"{prompt.text[:80]!r}: {fault}")
        else:
            found.setdefault(prompt_id(text), (prompt, text))
    return found


def _waiting(
    rendered: dict[str, tuple[Prompt, str]], done: set[str], tokenizer: ChatTokenizer
) -> list[_Waiting]:
    import numpy as np

    encoded = tokenizer.encode([text for _, text in rendered.values()])
    return [
        _Waiting(id, prompt, np.array(tokens, dtype=np.int32), id in done)
        for (id, (prompt, _)), tokens in zip(rendered.items(), encoded, strict=True)
    ]


def answer_window(
    model: nn.Module, tokenizer: ChatTokenizer, settings: GenerateConfig,
    waiting: Sequence[_Waiting],
) -> Iterator[Candidates]:  # fmt: skip
    """Candidates in the order of work, whatever the order in which answers end."""
    from fpo_mlx.judge import sampling, slots

    asked = [
        slots.Asked(
            one.tokens, [(settings.seed, int(one.id, 16), j) for j in range(settings.n)], one.known
        )
        for one in waiting
    ]  # fmt: skip
    order = slots.work_order(asked)
    found: dict[int, dict[int, Answer]] = {i: {} for i in order}
    next_up = 0
    answers = sampling.sample_all(
        model, asked, Sampling(settings.max_tokens, settings.temp, settings.seed),
        tokenizer.eos_token_ids, rows=settings.rows,
    )  # fmt: skip
    for i, j, answer in answers:
        found[i][j] = answer
        while next_up < len(order) and len(found[order[next_up]]) == settings.n:
            at = order[next_up]
            made = [answer for _, answer in sorted(found.pop(at).items())]
            yield _candidates(waiting[at], made, tokenizer, settings)
            next_up += 1


def _candidates(
    one: _Waiting, answers: Sequence[Answer], tokenizer: ChatTokenizer, settings: GenerateConfig
) -> Candidates:
    name = _name(settings)
    made = [
        Candidate(
            tokenizer.decode(answer.tokens.tolist(), skip_special=True),
            len(answer.tokens),
            "stop" if answer.finished else "length",
            round(answer.logp, 4),
            settings.seed,
            settings.temp,
            name,
        )  # fmt: skip
        for answer in answers
    ]
    if one.prompt.answer is not None:
        length = len(tokenizer.text_tokens(one.prompt.answer))
        made.append(Candidate(one.prompt.answer, length, "stop", model=HUMAN))
    return Candidates(one.id, one.prompt, tuple(made))


def _open(path: Path, settings: GenerateConfig, say: Say) -> nn.Module:
    from fpo_mlx.model.open import open_model  # which loads MLX

    trust = settings.trust_remote_code
    return open_model(
        path, adapter=settings.adapter_path or None, trust_remote_code=trust, say=say
    ).model
