"""Every written form of a pair gives the record that a reader would expect; the rest is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_mlx.data.check import LEVELS
from fpo_mlx.data.rows import Columns, RowFault, parse_row
from fpo_mlx.records import PairFacts


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


GOOD, BAD = (bot("Paris."),), (bot("Rome."),)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}
RESULT = {"role": "tool", "content": "12:00"}

FORMS = {
    "strings": (
        {"prompt": "Capital?", "chosen": "Paris.", "rejected": "Rome.", "score": 3},
        (user("Capital?"),),
    ),
    "strings with a system text": (
        {"system": "Be brief.", "prompt": "Capital?", "chosen": "Paris.", "rejected": "Rome."},
        (system("Be brief."), user("Capital?")),
    ),
    "an empty system text counts as none": (
        {"system": "", "prompt": "Capital?", "chosen": "Paris.", "rejected": "Rome."},
        (user("Capital?"),),
    ),
    "conversational": (
        {"prompt": [user("Capital?")], "chosen": [bot("Paris.")], "rejected": [bot("Rome.")]},
        (user("Capital?"),),
    ),
    "conversational, several turns": (
        {
            "prompt": [system("S"), user("Hi"), bot("Hello"), user("Capital?")],
            "chosen": [bot("Paris.")],
            "rejected": [bot("Rome.")],
        },
        (system("S"), user("Hi"), bot("Hello"), user("Capital?")),
    ),
    "a list for the prompt, texts for the answers": (
        {"prompt": [user("Capital?")], "chosen": "Paris.", "rejected": "Rome."},
        (user("Capital?"),),
    ),
    "a text for the prompt, lists for the answers": (
        {"prompt": "Capital?", "chosen": [bot("Paris.")], "rejected": [bot("Rome.")]},
        (user("Capital?"),),
    ),
    "implicit prompt": (
        {
            "chosen": [user("Hi"), bot("Hello"), user("Capital?"), bot("Paris.")],
            "rejected": [user("Hi"), bot("Hello"), user("Capital?"), bot("Rome.")],
        },
        (user("Hi"), bot("Hello"), user("Capital?")),
    ),
    "implicit prompt beside an empty prompt column, as a table gives it": (
        {
            "prompt": None,
            "chosen": [{"role": "user", "content": "Capital?", "name": None}, bot("Paris.")],
            "rejected": [user("Capital?"), bot("Rome.")],
        },
        (user("Capital?"),),
    ),
    "UltraFeedback-binarized": (
        {
            "prompt": "Capital?",
            "prompt_id": "f0e3",
            "chosen": [user("Capital?"), bot("Paris.")],
            "rejected": [user("Capital?"), bot("Rome.")],
            "messages": [user("Capital?"), bot("Paris.")],
            "score_chosen": 9.0,
        },
        (user("Capital?"),),
    ),
    "UltraFeedback-binarized with a system text": (
        {
            "system": "S",
            "prompt": "Capital?",
            "chosen": [user("Capital?"), bot("Paris.")],
            "rejected": [user("Capital?"), bot("Rome.")],
        },
        (system("S"), user("Capital?")),
    ),
    "whole conversations beside their own beginning": (
        {
            "prompt": [user("Capital?")],
            "chosen": [user("Capital?"), bot("Paris.")],
            "rejected": [user("Capital?"), bot("Rome.")],
        },
        (user("Capital?"),),
    ),
    "transcripts": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Capital?\n\nAssistant: Paris.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Capital?\n\nAssistant: Rome.",
        },
        (user("Hi"), bot("Hello"), user("Capital?")),
    ),
    "a transcript for the prompt": (
        {
            "prompt": "\n\nHuman: Capital?\n\nAssistant:",
            "chosen": " Paris.",
            "rejected": " Rome.",
        },
        (user("Capital?"),),
    ),
    "lists of text parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Capital?"}]}],
            "chosen": [bot("Paris.")],
            "rejected": [bot("Rome.")],
        },
        (user("Capital?"),),
    ),
    "a tool's answer in the prompt": (
        {
            "prompt": [user("Time?"), {**CALL, "content": None}, RESULT],
            "chosen": "Paris.",
            "rejected": "Rome.",
        },
        (user("Time?"), CALL, RESULT),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_read(name):
    record, prompt = FORMS[name]
    row = parse_row(record, where="train.jsonl:7", index=6)
    assert row.prompt == prompt
    assert (row.chosen, row.rejected) == (GOOD, BAD)
    assert (row.where, row.index, row.tools) == ("train.jsonl:7", 6, None)


def test_a_shared_tool_call_belongs_to_both_answers():
    begin = [user("Time?"), CALL, RESULT]
    row = parse_row({"chosen": [*begin, bot("Noon.")], "rejected": [*begin, bot("Late.")]})
    assert row.prompt == tuple(begin)  # the tool spoke last: the answers part after it
    # the same where the prompt stands in a column of its own
    row = parse_row({"prompt": "Time?", "chosen": [CALL, RESULT, bot("Noon.")],
                     "rejected": [CALL, RESULT, bot("Late.")]})  # fmt: skip
    assert row.prompt == tuple(begin)
    assert (row.chosen, row.rejected) == ((bot("Noon."),), (bot("Late."),))


@pytest.mark.parametrize("result", [RESULT, {**RESULT, "content": ""}])
def test_a_prompt_that_ends_with_a_tool_may_stand_beside_whole_conversations(result):
    begin = [user("Time?"), {**CALL, "content": None}, result]
    row = parse_row({"prompt": begin, "chosen": [*begin, *GOOD], "rejected": [*begin, *BAD]})
    assert row.prompt == (user("Time?"), CALL, result)
    assert (row.chosen, row.rejected) == (GOOD, BAD)


def test_an_answer_of_several_turns_is_refused_for_the_words_that_are_not_the_models():
    tail = [CALL, RESULT, bot("Noon.")], [CALL, {**RESULT, "content": "?"}, bot("Late.")]
    with pytest.raises(RowFault, match=r"chosen has 3 turns .*the tool's words") as caught:
        parse_row({"chosen": [user("Time?"), *tail[0]], "rejected": [user("Time?"), *tail[1]]})
    assert caught.value.kind == "role order"


def test_column_names_can_be_chosen():
    columns = Columns("question", "better", "worse", "rules", "functions")
    record = {"question": "Q", "better": "A", "worse": "B", "rules": "R", "chosen": 1, "prompt": 2}
    row = parse_row({**record, "functions": [{"name": "f"}]}, columns)
    assert row.prompt == (system("R"), user("Q"))
    assert (row.chosen, row.rejected) == ((bot("A"),), (bot("B"),))
    assert row.tools == ({"name": "f"},)
    with pytest.raises(RowFault, match="no 'better'"):
        parse_row({"question": "Q", "worse": "B"}, columns)


def test_tools_may_be_written_as_json_text():
    row = parse_row({"prompt": "Q", "chosen": "A", "rejected": "B", "tools": '[{"name": "f"}]'})
    assert row.tools == ({"name": "f"},)


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
FAULTS = [
    (["a", "list"], "wrong type", "a row is an object with named columns, not a list"),
    ({}, "missing field", "no 'chosen' (the row has: 'none')"),
    ({"prompt": "Q", "rejected": "B"}, "missing field", "no 'chosen'"),
    ({**PAIR, "rejected": None}, "empty field", "rejected is null"),
    ({**PAIR, "chosen": float("nan")}, "empty field", "chosen is NaN"),
    ({"chosen": "A", "rejected": "B"}, "missing field", "no 'prompt'"),
    ({"chosen": [bot("A")], "rejected": [bot("B")]}, "missing field", "no 'prompt'"),
    ({**PAIR, "chosen": ""}, "empty field", "chosen is empty"),
    ({**PAIR, "chosen": " \n"}, "empty field", "chosen is empty"),
    ({**PAIR, "prompt": ""}, "empty field", "prompt is empty"),
    ({**PAIR, "prompt": []}, "empty field", "prompt is an empty list"),
    ({**PAIR, "chosen": [], "rejected": [bot("B")]}, "empty field", "chosen is empty"),
    ({**PAIR, "chosen": [bot("")], "rejected": [bot("B")]}, "empty field", "chosen[0].content"),
    ({**PAIR, "chosen": 3}, "wrong type", "chosen is a number but rejected is a text"),
    ({**PAIR, "chosen": 3, "rejected": 4}, "wrong type", "wanted a text or a list"),
    ({**PAIR, "chosen": [bot("A")]}, "wrong type", "chosen is a list but rejected is a text"),
    ({**PAIR, "prompt": {"a": 1}}, "wrong type", "prompt is an object"),
    ({**PAIR, "prompt": ["Q"]}, "wrong type", "prompt[0] is a text, wanted {role, content}"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "missing field", "prompt[0] has no content"),
    ({**PAIR, "prompt": [{"who": "human"}]}, "missing field", "prompt[0] has no role"),
    ({**PAIR, "prompt": [user(5)]}, "wrong type", "prompt[0].content is a number"),
    ({**PAIR, "prompt": [user([{"type": "image"}])]}, "wrong type", "part that is not text"),
    ({**PAIR, "system": 5}, "wrong type", "system is a number"),
    ({**PAIR, "tools": "{"}, "wrong type", "tools is a text that is no JSON"),
    ({**PAIR, "weight": "high"}, "wrong type", "weight is 'high', wanted a finite number"),
    ({**PAIR, "weight": 10**400}, "wrong type", "wanted a finite number"),
    ({**PAIR, "weight": "inf"}, "wrong type", "wanted a finite number"),
    ({**PAIR, "weight": True}, "wrong type", "weight is True, wanted a finite number"),
    ({**PAIR, "weight": "-1"}, "out of range", "weight is -1, wanted 0 or more"),
    ({**PAIR, "agreement": "1.5"}, "out of range", "agreement is 1.5, wanted 0 to 1"),
    ({**PAIR, "tools": [1]}, "wrong type", "tools is a list, wanted a list of objects"),
    ({**PAIR, "prompt": "\n\nHuman: \n\nAssistant:"}, "empty field", "prompt, turn 1 is empty"),
    ({**PAIR, "prompt": "Human: a\n\nAssistant: b\n\nHuman:"}, "empty field", "turn 3 is empty"),
    ({**PAIR, "rejected": "A"}, "same response", "chosen and rejected are the same"),
    ({"chosen": [user("Q"), bot("A")], "rejected": [user("Q"), bot("A")]}, "same response", "same"),
    ({**PAIR, "chosen": "\ud800"}, "broken text", "half a surrogate pair at character 0"),
    ({**PAIR, "prompt": [{"role": "alien", "content": "Q"}]}, "role order", "has the role 'alien'"),
    ({**PAIR, "prompt": [bot("A")]}, "role order", "'assistant' comes after 'start'"),
    ({**PAIR, "prompt": [user("Q"), bot("A")]}, "role order", "'assistant' comes after 'assistant"),
    ({**PAIR, "prompt": [user("Q"), user("Q")]}, "role order", "'user' comes after 'user'"),
    ({**PAIR, "prompt": [user("Q"), system("S")]}, "role order", "'system' comes after 'user'"),
    ({**PAIR, "prompt": [system("S")]}, "role order", "'assistant' comes after 'system'"),
    ({**PAIR, "system": "S", "prompt": [system("T"), user("Q")]}, "role order", "differ"),
    (
        {**PAIR, "chosen": [bot("A"), user("B"), bot("C")], "rejected": [bot("B")]},
        "role order",
        "chosen has 3 turns behind where the two part (assistant, user, assistant), and the user's",
    ),
    (
        {"chosen": [user("Q"), bot("A"), user("R")], "rejected": [user("Q"), bot("B")]},
        "role order",
        "chosen does not end with the assistant's answer",
    ),
    (
        {"chosen": [user("Q"), bot("A")], "rejected": [user("R"), bot("B")]},
        "no shared prompt",
        "differ from their first message on",
    ),
    (
        {"prompt": "X", "chosen": [user("Q"), bot("A")], "rejected": [user("Q"), bot("B")]},
        "no shared prompt",
        "prompt is not in the conversations",
    ),
    (
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: A",
            "rejected": "\n\nHuman: Q\n\nAssistant: ",
        },
        "empty field",
        "rejected ends with an empty answer",
    ),
]


@pytest.mark.parametrize(("record", "kind", "said"), FAULTS)
def test_each_fault_is_named(record, kind, said):
    with pytest.raises(RowFault) as caught:
        parse_row(record)
    assert caught.value.kind == kind
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert LEVELS[kind] == "refused"


JUDGED = Columns(scores=("score_chosen", "score_rejected"))


@pytest.mark.parametrize(
    ("cells", "facts"),
    [
        ({"agreement": "0.9", "weight": " 2 "}, PairFacts(0.9, 2.0)),
        ({"agreement": "", "weight": " "}, PairFacts()),
        ({"agreement": float("nan"), "weight": "nan"}, PairFacts()),
        ({"agreement": None}, PairFacts()),
    ],
)
def test_numbers_are_read_from_the_texts_of_a_csv_and_what_is_missing_changes_nothing(cells, facts):
    assert parse_row({**PAIR, **cells}).facts == facts


def test_scores_are_read_from_texts_and_a_missing_one_is_named():
    scores = {"score_chosen": "4", "score_rejected": "1.5"}
    assert parse_row({**PAIR, **scores}, JUDGED).facts == PairFacts(score_gap=2.5)
    with pytest.raises(RowFault, match="no 'score_rejected', which --score-margin needs"):
        parse_row({**PAIR, **scores, "score_rejected": ""}, JUDGED)


def test_a_plain_answer_that_begins_with_human_is_no_transcript():
    row = parse_row({"prompt": "Who?", "chosen": "Human: me", "rejected": "Human: you"})
    assert row.chosen == (bot("Human: me"),)


def test_a_transcript_with_windows_line_ends_is_the_same_pair():
    row = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    windows = {key: text.replace("\n", "\r\n") for key, text in row.items()}
    assert parse_row(windows) == parse_row(row)
    assert parse_row(windows).chosen == (bot("A"),)


TEXTS = st.sampled_from(["", " ", "Q", "A", "\n\nHuman: Q\n\nAssistant: A", "\ud800", "[]"])
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", 3, None])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.text())
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES, "content": TEXTS | st.text(max_size=5)},
    optional={"tool_calls": ANYTHING, "name": ANYTHING},
)
FIELD = st.one_of(ANYTHING, TEXTS, st.text(), st.lists(MESSAGE | ANYTHING, max_size=4))
ROW = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {}, optional={k: FIELD for k in ("prompt", "chosen", "rejected", "system", "tools")}
    ),
)
# conversations that are often right, so that the fuzz reaches past the first check
TURNS = st.lists(st.builds(lambda role, text: {"role": role, "content": text},
                           st.sampled_from(["user", "assistant"]), st.sampled_from("QAB")),
                 min_size=1, max_size=4)  # fmt: skip
ALMOST = st.fixed_dictionaries(
    {"chosen": TURNS, "rejected": TURNS}, optional={"prompt": TURNS | st.sampled_from("QAB")}
)


@given(ROW | ALMOST)
def test_any_value_gives_a_sound_row_or_a_fault_with_a_known_kind(record):
    try:
        row = parse_row(record)
    except RowFault as fault:
        assert LEVELS[fault.kind] == "refused"  # noqa: PT017
        str(fault).encode()
        return
    assert row.prompt[-1]["role"] in ("user", "tool")
    assert row.chosen != row.rejected
    for answer in (row.chosen, row.rejected):
        assert answer[0]["role"] == answer[-1]["role"] == "assistant"
        assert all(turn["role"] != "user" for turn in answer)
    json.dumps([row.prompt, row.chosen, row.rejected], ensure_ascii=False).encode()
