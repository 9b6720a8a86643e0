"""Forms in which people keep messages and pairs: the meaning stays, or the row is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_mlx.data import Columns, parse_row
from fpo_mlx.data.messages import RowFault, conversation_in, tool_calls

PAIR = {"prompt": "Say yes.", "chosen": "Yes.", "rejected": "No."}


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


WHOLE = {side: [user("Say yes."), bot(PAIR[side])] for side in ("chosen", "rejected")}
GPT = {"from": "gpt", "value": "Yes."}, {"from": "gpt", "value": "No."}
HUMAN = {"from": "human", "value": "Say yes."}
# name -> a row that says what PAIR says
SAME = {
    "ShareGPT lists": {"prompt": [HUMAN], "chosen": [GPT[0]], "rejected": [GPT[1]]},
    "ShareGPT, whole": {"chosen": [HUMAN, GPT[0]], "rejected": [HUMAN, GPT[1]]},
    "LLaMA-Factory": {"conversations": [HUMAN], "chosen": GPT[0], "rejected": GPT[1]},
    "axolotl": {"messages": [user("Say yes.")], "chosen": bot("Yes."), "rejected": bot("No.")},
    "Alpaca": {"instruction": "Say yes.", "input": "", "chosen": "Yes.", "rejected": "No."},
    "orca": {"system": "", "question": "Say yes.", "chosen": "Yes.", "rejected": "No."},
    "OpenAI": {
        "input": {"messages": [user("Say yes.")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [bot("Yes.")],
        "non_preferred_output": [bot("No.")],
    },
    "HelpSteer2": {"prompt": "Say yes.", "response_1": "No.", "response_2": "Yes.",
                   "preference_strength": 2},
    "HelpSteer3": {"context": [user("Say yes.")], "response1": "Yes.", "response2": "No.",
                   "overall_preference": -1},
    "SafeRLHF": {"prompt": "Say yes.", "response_0": "No.", "response_1": "Yes.",
                 "better_response_id": 1},
    "Arena": {"conversation_a": WHOLE["rejected"], "conversation_b": WHOLE["chosen"],
              "winner": "model_b"},
    "NeMo RL": {"context": [user("Say yes.")], "completions": [
        {"rank": 1, "completion": [bot("No.")]}, {"rank": 0, "completion": [bot("Yes.")]}]},
    "LLaMA-Factory, older": {"instruction": "Say yes.", "input": "", "output": ["Yes.", "No."]},
    "two scores": {"prompt": "Say yes.", "responses": ["No.", "Yes."], "scores": [1, 4.5]},
    "JSON text": {side: json.dumps(turns) for side, turns in WHOLE.items()},
    "Python text": {side: str(turns) for side, turns in WHOLE.items()},
    "numpy text": {side: str(turns).replace("}, {", "}\n {") for side, turns in WHOLE.items()},
    "array text": {s: f"array({turns}, dtype=object)" for s, turns in WHOLE.items()},
    "prompt as text": {**PAIR, "prompt": json.dumps([user("Say yes.")])},
    "empty system": {**WHOLE, "chosen": [{"role": "system", "content": ""}, *WHOLE["chosen"]],
                     "rejected": [{"role": "system", "content": None}, *WHOLE["rejected"]]},
    "NaN for nothing": {**PAIR, "system": float("nan"), "tools": float("nan")},
    "tools of nothing": {**PAIR, "tools": "[]"},
    "filled up by Arrow": {
        side: [{**turn, "tool_calls": None, "name": None, "from": None} for turn in turns]
        for side, turns in WHOLE.items()
    },
    "roles in capitals": {
        side: [{**turn, "role": turn["role"].title()} for turn in turns]
        for side, turns in WHOLE.items()
    },
    "an object for a prompt": {**PAIR, "prompt": user("Say yes.")},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_one_pair_in_every_form_is_one_pair(name):
    row = parse_row(SAME[name])
    assert row.prompt == (user("Say yes."),)
    assert (row.chosen, row.rejected) == ((bot("Yes."),), (bot("No."),))
    assert row.tools is None
    assert bool(row.as_text) == ("text" in name)


def test_a_system_column_may_hold_one_system_message():
    row = parse_row({**PAIR, "system": [{"role": "system", "content": "Be brief."}]})
    assert row.prompt[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(RowFault, match="system is a list"):
        parse_row({**PAIR, "system": [user("Be brief.")]})


def test_an_instruction_that_is_named_as_the_prompt_has_its_input_too():
    """As `two prompts` advises; its input was left out in silence."""
    row = {"instruction": "Translate.", "input": "Ja", "context": "German", "chosen": "Yes",
           "rejected": "No"}  # fmt: skip
    with pytest.raises(RowFault, match="instruction and context differ"):
        parse_row(row)
    named = Columns(prompt="instruction")
    assert parse_row(row, named).prompt == (user("Translate.\nJa"),)
    whole = {"chosen": [user("Hi"), bot("Hallo")], "rejected": [user("Hi"), bot("Hej")]}
    with pytest.raises(RowFault, match="no shared prompt|not in the conversations"):
        parse_row({"instruction": "Translate to German.", **whole}, named)


def test_alpacas_input_and_history_are_part_of_the_prompt():
    row = parse_row({"instruction": "Translate.", "input": "Ja", "chosen": "Yes", "rejected": "No",
                     "history": [["Hi", "Hello."]]})  # fmt: skip
    assert row.prompt == (user("Hi"), bot("Hello."), user("Translate.\nJa"))


@pytest.mark.parametrize("nothing", ["", None, float("nan"), [], "[]"])
def test_a_history_that_holds_nothing_is_none(nothing):
    """An empty cell of a CSV is an empty text."""
    row = {"instruction": "Translate.", "history": nothing, "chosen": "Yes", "rejected": "No"}
    assert parse_row(row).prompt == (user("Translate."),)


ASKED = {"question": "Say yes.", "chosen": "Yes.", "rejected": "No."}
PROMPT_TWICE = {
    "the same words": {"context": "Say  yes.\n"},
    "as messages": {"messages": [user("Say yes.")]},
    "as messages with the answer": {"messages": [user("Say yes."), bot("Yes.")]},
    "as messages, another answer": {"conversations": [HUMAN, {"from": "gpt", "value": "Maybe"}]},
    "with the system column's text": {"messages": [{"role": "system", "content": "Be brief."},
                                                   user("Say yes.")], "system": "Be brief."},
    "a part of it": {"query": "yes."},
    "nothing": {"context": "", "query": None, "messages": [], "conversation": float("nan")},
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPT_TWICE)
def test_a_prompt_that_stands_in_two_columns_is_read_once(name):
    row = parse_row({**ASKED, **PROMPT_TWICE[name]})
    assert row.prompt[-1] == user("Say yes.")
    assert row.chosen == (bot("Yes."),)


PASSAGE = "Paris has two million people."
TWO_PROMPTS = {
    "a passage beside its question": ({**ASKED, "context": PASSAGE}, "question and context"),
    "a passage in parts": ({**ASKED, "context": {"title": ["Paris"], "text": [PASSAGE]}},
                           "question and context"),
    "Dolly": ({"instruction": "Say yes.", "context": PASSAGE, "chosen": "Yes.", "rejected": "No."},
              "instruction and context"),
    "the turns before it": ({"query": "Say yes.", "conversation": [user("Hi"), bot("Hello")],
                             "chosen": [bot("Yes.")], "rejected": [bot("No.")]},
                            "query and conversation"),
    "a system message": ({**ASKED, "messages": json.dumps([{"role": "system", "content": "Brief!"},
                                                           user("Say yes.")])},
                         "question and messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_PROMPTS)
def test_words_of_a_second_prompt_column_are_never_left_out_in_silence(name):
    record, said = TWO_PROMPTS[name]
    with pytest.raises(RowFault, match=f"{said} .*--prompt-feature") as caught:
        parse_row(record)
    assert caught.value.kind == "two prompts"
    first = said.split()[0]
    assert parse_row(record, Columns(prompt=first)).prompt == (user("Say yes."),)
    assert parse_row({**record, "prompt": "Say yes."}).prompt == (user("Say yes."),)


REFUSED = {
    "an unpaired row": ({"prompt": "Q", "completion": "A", "label": 1}, "missing field", "no pair"),
    "a rated answer": ({"prompt": "Q", "response": "A", "rating": 4}, "missing field", "no pair"),
    "several rated answers": ({"prompt": "Q", "completions": list("abc"), "ratings": [1, 2, 3]},
                              "missing field", "3 completions and their ratings: no pair"),
    "answers of pairs generate": ({"id": "1", "prompt": "Q", "candidates": [{"text": "a"}] * 2},
                                  "missing field", "`fpo-mlx pairs build` makes pairs of them"),
    "a tie": ({**SAME["HelpSteer2"], "preference_strength": 0}, "no preference", "neither"),
    "a tie in words": ({**SAME["Arena"], "winner": "tie (bothbad)"}, "no preference", "neither"),
    "an odd winner": ({**SAME["Arena"], "winner": "x"}, "wrong type", "names no better answer"),
    "half a winner": ({**SAME["SafeRLHF"], "better_response_id": 0.5}, "wrong type",
                      "names no better answer"),
    "a missing score": ({"prompt": "Q", "responses": ["a", "b"], "scores": [None, 1]},
                        "wrong type", "scores is [None, 1], wanted two numbers"),
    "four answers": ({"prompt": "Q", "responses": list("abcd"), "scores": [1, 2, 3, 4]},
                     "wrong type", "4 responses"),
    "images": ({**PAIR, "images": ["a.png"]}, "wrong type", "the row has images"),
    "an image": ({**PAIR, "image": {"bytes": b"PNG", "path": None}}, "wrong type",
                 "the row has image"),
    "a video": ({**PAIR, "video": "a.mp4"}, "wrong type", "the row has video"),
    "a sound": ({**PAIR, "audio": object()}, "wrong type", "the row has audio"),
    "a broken list": ({**PAIR, "prompt": "[{'role': 'user', 'content': 'a"}, "wrong type",
                      "neither JSON nor Python"),
    "a text around messages": (
        {side: json.dumps({"messages": turns, "tools": []}) for side, turns in WHOLE.items()},
        "wrong type", "the text of an object around `messages`",
    ),
    "three answers in a list": ({"instruction": "Q", "output": ["a", "b", "c"]}, "wrong type",
                                "output has 3 answers"),
    "a rejected answer of the user": ({"prompt": [user("Q")], "chosen": [bot("A")],
                                       "rejected": [user("B")]}, "no shared prompt", "differ"),
    "answers in objects": ({"prompt": "Q", "chosen": {"answer": "A", "score": 1},
                            "rejected": {"answer": "B", "score": 0}}, "missing field", "no role"),
    "tools as an object": ({**PAIR, "tools": {"name": "f"}}, "wrong type", "tools is an object"),
    "one side as text": ({**PAIR, "chosen": json.dumps(WHOLE["chosen"])}, "wrong type",
                         "chosen is a list but rejected is a text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused_for_what_it_is(name):
    record, kind, said = REFUSED[name]
    with pytest.raises(RowFault) as caught:
        parse_row(record)
    assert caught.value.kind == kind
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", '{"role": "admin", "content": "x"}', "[see below] 'role': x", "{", "a: b", "[{}]",
     '[{"a": {"role": "user"}}]'],
)  # fmt: skip
def test_ordinary_text_is_never_taken_for_messages(text):
    assert conversation_in(text, "chosen") is None


@pytest.mark.parametrize(
    "nothing", [None, "", [], float("nan"), {"bytes": None, "path": None}, [{"bytes": None}]]
)
def test_a_column_for_an_image_that_holds_none_does_no_harm(nothing):
    assert parse_row({**PAIR, "image": nothing, "images": nothing}) == parse_row(PAIR)


@settings(max_examples=60)
@given(st.text(max_size=30), st.sampled_from(["user", "assistant", "system"]))
def test_messages_come_back_from_their_json_and_python_text(words, role):
    turns = [{"role": role, "content": words}]
    assert conversation_in(json.dumps(turns), "p") == turns
    assert conversation_in(str(turns), "p") == turns


def test_arguments_as_text_are_the_arguments_as_an_object_and_a_null_in_them_stays():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    text = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": null}'}}
    (from_object,), (from_text,) = tool_calls([call], "x"), tool_calls([text], "x")
    assert from_text["function"]["arguments"] == {"a": 1, "b": None}
    assert from_object["function"]["arguments"] == {"a": 1}  # Arrow's null, as far as anyone knows
    assert tool_calls(json.dumps([text]), "x") == [from_text]
    assert tool_calls([json.dumps(text)], "x") == [from_text]
    with pytest.raises(RowFault, match="arguments is a text that is no JSON"):
        tool_calls([{"name": "f", "arguments": "a=1"}], "x")


def test_sharegpts_calls_and_observations_become_tool_calls_and_tools():
    row = parse_row({
        "conversations": [
            HUMAN, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "12"},
        ],
        "chosen": GPT[0], "rejected": GPT[1],
        "tools": '[{"type": "function", "function": {"name": "f", "parameters": null}}]',
    })  # fmt: skip
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert row.prompt == (user("Say yes."), call, {"role": "tool", "content": "12"})
    assert row.tools == ({"type": "function", "function": {"name": "f"}},)
