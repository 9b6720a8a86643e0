"""Layouts of published preference data whose columns are not prompt, chosen and rejected.

Each is taken only where its meaning is plain: who won is written in the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fpo_mlx.data.messages import (
    NoPair,
    RowFault,
    from_json,
    kind,
    role_of,
    short,
    squeezed,
    without_nulls,
)

# columns that hold the prompt where there is no `prompt`: the first that is filled
PROMPTS = ("instruction", "question", "query", "messages", "conversations", "conversation",
           "context")  # fmt: skip
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)  # fmt: skip
VARIABLES = "chat_template_kwargs"
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_ONE = ("response", "completion", "answer")  # of a row that is no pair
_MANY = ("responses", "completions", "answers", "generations", "outputs")
_JUDGED = ("label", "score", "helpfulness", "rating", "reward", "labels", "scores", "ratings",
           "rewards", "ranks")  # fmt: skip
_WANTED = "Wanted two answers to one prompt, chosen and rejected"
_TIES = ("tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "draw", "equal")


def _signed(value: Any) -> int | None:
    """HelpSteer's strength of preference: below 0 the first is the better, above 0 the second."""
    number = _number(value)
    return None if number is None else (number > 0) - (number < 0)


def _numbered(value: Any) -> int | None:
    """0 or 1: the better one's number."""
    number = _number(value)
    return {0.0: -1, 1.0: 1}.get(number) if number is not None else None


def _named(value: Any) -> int | None:
    """Arena's winner."""
    if not isinstance(value, str):
        return None
    word = value.strip().lower()
    if word in _TIES:
        return 0
    return {"model_a": -1, "a": -1, "model_b": 1, "b": 1}.get(word)


# (first answer, second answer, verdict, what the verdict means: -1 first, 1 second, 0 neither)
_DUELS: tuple[tuple[str, str, str, Callable[[Any], int | None]], ...] = (
    ("response1", "response2", "overall_preference", _signed),  # HelpSteer3
    ("response_1", "response_2", "preference_strength", _signed),  # HelpSteer2's preferences
    ("response_0", "response_1", "better_response_id", _numbered),  # PKU-SafeRLHF
    ("response_a", "response_b", "winner", _named),
    ("conversation_a", "conversation_b", "winner", _named),  # Chatbot Arena
)


def as_pair(record: Mapping, columns: Any) -> Mapping:
    """The record with its parts under the names of `columns`. Raises RowFault."""
    media = next((name for name in MEDIA if name in record and _holds(record[name])), None)
    if media is not None:
        what = f"the row has {media}; only texts can be trained on here"
        raise RowFault("wrong type", f"{what}. Take the column out if the texts do without it")
    if record.get(columns.chosen) is not None or record.get(columns.rejected) is not None:
        return record
    if "preferred_output" in record and "non_preferred_output" in record:
        return _openai(record, columns)
    for first, second, verdict, meaning in _DUELS:
        if {first, second, verdict} <= set(record):
            winner = meaning(record[verdict])
            return _decided(record, columns, (record[first], record[second]), winner, verdict)
    if isinstance(record.get("completions"), list) and filled(record.get("context")):
        return _ranked(record, columns)
    if isinstance(record.get("output"), list) and "instruction" in record:
        return _better_first(record, columns)
    if isinstance(record.get("responses"), list) and isinstance(record.get("scores"), list):
        return _scored(record, columns)
    _refuse_no_pair(record)
    return record


def _holds(value: Any) -> bool:
    """Whether a column of media holds any: a table writes an object of nulls where it has none."""
    plain = (str, int, float, type(None))  # anything else is what `datasets` made of media
    return any(not isinstance(one, plain) or (one and one == one) for one in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What lists and objects hold, however deep: of a message what it says, of a part no type."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            said = [key for key in ("content", "value") if key in one]
            left += [one[key] for key in said or one if key != "type"]
        elif isinstance(one, list):
            left += reversed(one)
        else:
            yield one


def _openai(record: Mapping, columns: Any) -> Mapping:
    """{"input": {"messages": […], "tools": […]}, "preferred_output": […], …}"""
    given = record.get("input")
    if isinstance(given, Mapping):
        prompt, tools = given.get("messages"), given.get("tools")
    else:
        prompt, tools = given, record.get(columns.tools)
    return {
        **record,
        columns.prompt: prompt,
        columns.tools: tools,
        columns.chosen: record["preferred_output"],
        columns.rejected: record["non_preferred_output"],
    }


def _decided(
    record: Mapping, columns: Any, answers: Sequence[Any], winner: int | None, verdict: str
) -> Mapping:
    if winner is None:
        said = short(record.get(verdict))
        raise RowFault("wrong type", f"{verdict} is {said}, which names no better answer")
    if winner == 0:
        raise RowFault("no preference", f"{verdict} prefers neither answer")
    chosen, rejected = answers if winner < 0 else (answers[1], answers[0])
    return {**record, columns.chosen: chosen, columns.rejected: rejected}


def _ranked(record: Mapping, columns: Any) -> Mapping:
    """NeMo RL's {"context": […], "completions": [{"rank": 0, "completion": […]}, …]}."""
    ranked = [one for one in record["completions"] if isinstance(one, Mapping)]
    ranks = [_number(one.get("rank")) for one in ranked]
    if len(ranks) != 2 or len(record["completions"]) != 2 or None in ranks:
        raise RowFault("wrong type", "completions: wanted two objects of rank and completion")
    left, right = (rank or 0.0 for rank in ranks)
    answers = [one.get("completion") for one in ranked]
    return _decided(record, columns, answers, (left > right) - (left < right), "rank")


def _better_first(record: Mapping, columns: Any) -> Mapping:
    """LLaMA-Factory's older {"instruction": …, "output": [better, worse]}."""
    if len(record["output"]) != 2:
        found = len(record["output"])
        raise RowFault("wrong type", f"output has {found} answers, wanted the better and the worse")
    better, worse = record["output"]
    return {**record, columns.chosen: better, columns.rejected: worse}


def _scored(record: Mapping, columns: Any) -> Mapping:
    """Two responses with a score each."""
    answers, scores = record["responses"], [_number(one) for one in record["scores"]]
    if len(answers) == len(scores) == 2 and None in scores:
        raise RowFault("wrong type", f"scores is {short(record['scores'])}, wanted two numbers")
    if len(answers) != 2 or len(scores) != 2:
        raise NoPair(
            "wrong type",
            f"{len(answers)} responses and {len(scores)} scores: which two make the pair is a "
            "choice of yours; wanted two of each, or chosen and rejected",
            len(answers),
        )
    left, right = (score or 0.0 for score in scores)
    return _decided(record, columns, answers, (right > left) - (right < left), "scores")


def _refuse_no_pair(record: Mapping) -> None:
    """Of a row of another kind, saying which columns are missing would not help."""
    judged = next((name for name in _JUDGED if name in record), None)
    if isinstance(record.get("candidates"), list) and "id" in record:
        raise NoPair(
            "missing field",
            "candidates, as `fpo-mlx pairs generate` writes them: `fpo-mlx pairs build` makes "
            "pairs of them",
            len(record["candidates"]),
        )
    many = next((name for name in _MANY if isinstance(record.get(name), list)), None)
    if many is not None:
        more = f" and their {judged}" if judged else ""
        count = len(record[many])
        raise NoPair("missing field", f"{count} {many}{more}: no pair. {_WANTED}", count)
    one = next((name for name in _ONE if record.get(name)), None)
    if one is not None and judged is not None:
        raise NoPair("missing field", f"one answer ({one}) and its {judged}: no pair. {_WANTED}")


def whole_prompt(record: Mapping, columns: Any) -> Any:
    """The prompt column, and what belongs to it; None where nothing is in it."""
    given = record.get(columns.prompt)
    if filled(given) and columns.prompt == "instruction":
        return _alpaca(record)
    return given if filled(given) else None


def prompt_of(record: Mapping, columns: Any) -> Any:
    """Where `whole_prompt` found nothing: one of the columns that other sets keep the prompt in.

    Raises RowFault where another of them holds words that would be left out.
    """
    given = record.get(columns.prompt)
    if columns.prompt != "prompt":
        return given
    names = [name for name in PROMPTS if filled(record.get(name))]
    if not names:
        return given
    prompt = _alpaca(record) if names[0] == "instruction" else record[names[0]]
    if len(names) > 1:
        _check_others(record, columns, names, prompt)
    return prompt


def _check_others(record: Mapping, columns: Any, names: Sequence[str], prompt: Any) -> None:
    """Raises RowFault where one of `names` but the first has words that are nowhere else."""
    beside = (record.get(name) for name in (columns.system, columns.chosen, columns.rejected))
    read = squeezed(" ".join(_words([prompt, *beside])))
    for name in names[1:]:
        if any(squeezed(text) not in read for text in _words(_without_answer(record[name]))):
            raise RowFault(
                "two prompts",
                f"{names[0]} and {name} differ, and {names[0]} alone would be the prompt. Write "
                "both into one column `prompt`, or name the one that is it (--prompt-feature)",
            )


def _words(value: Any) -> list[str]:
    return [one for one in _parts(value) if isinstance(one, str)]


def _without_answer(value: Any) -> Any:
    """Messages without a last one of the assistant, which is an answer and no prompt."""
    last = value[-1] if isinstance(value, list) else None
    answers = isinstance(last, Mapping) and role_of(last) == "assistant"
    return value[:-1] if answers else value


def _alpaca(record: Mapping) -> Any:
    """instruction, its input on the next line, and the turns before it as [question, answer]."""
    text, more = record["instruction"], record.get("input")
    if not isinstance(text, str):
        return text
    if isinstance(more, str) and more.strip():
        text = f"{text}\n{more}"
    given = record.get("history")
    history = (from_json(given, "history") if filled(given) else None) or []
    if not isinstance(history, list) or not all(_is_exchange(turn) for turn in history):
        raise RowFault("wrong type", f"history is {kind(history)}, wanted [[question, answer], …]")
    if not history:
        return text
    roles = ("user", "assistant")
    turns = [{"role": r, "content": t} for two in history for r, t in zip(roles, two, strict=True)]
    return [*turns, {"role": "user", "content": text}]


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)


def scores_of(record: Mapping) -> tuple[float, float] | None:
    """(chosen's score, rejected's) where the row has both."""
    for names in SCORES:
        if names[0] not in record:  # most rows have no scores
            continue
        left, right = (_number(record.get(name)) for name in names)
        if left is not None and right is not None:
            return left, right
    return None


def variables_of(record: Mapping) -> dict[str, Any] | None:
    """TRL's variables of the chat template for one row; None where it has none. Raises RowFault."""
    given = record.get(VARIABLES)
    found = from_json(given, VARIABLES) if filled(given) else None
    if found is not None and not isinstance(found, Mapping):
        raise RowFault("wrong type", f"{VARIABLES} is {kind(found)}, wanted an object")
    return without_nulls(found or {}) or None


def filled(value: Any) -> bool:
    """False for what stands for nothing: null, an empty text or list, pandas' NaN."""
    return not (value is None or value == "" or value == [] or (value != value))


def as_number(value: Any) -> Any:
    """A number, or the text of one (a CSV has nothing else), as a float; another text stripped."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    try:
        return float(value)
    except ValueError:
        return str(value).strip()
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def is_finite(value: Any) -> bool:
    """Whether this is a finite number. value: of `as_number`."""
    return isinstance(value, float) and math.isfinite(value)


def _number(value: Any) -> float | None:
    found = as_number(value)
    return found if is_finite(found) else None
