"""What a chat template does to a row: nothing of an answer is lost, and what is added is said."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from tiny_tokenizer import CHATML, build_tiny_tokenizer

from fpo_mlx.data import RawRow, check_data, parse_row, tokenize_row
from fpo_mlx.data.answers import answer_tokens
from fpo_mlx.data.faithful import added_before, lost_of_answer, lost_of_prompt
from fpo_mlx.data.findings import LEVELS
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.prepare import prepare
from fpo_mlx.data.tokenizer import VocabularyFault, load_tokenizer
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.saetrain.texts import read_documents
from fpo_mlx.storage.limits import model_limits

R1 = CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
QWEN3 = CHATML.replace(
    "{{ message['content'] }}",
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
PHI3 = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
HEADER_THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
WITH_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>CALL</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = {
    "tojson": WITH_CALLS.replace("CALL", "{{ c.function.name }} {{ c.function.arguments|tojson }}"),
    "items": WITH_CALLS.replace(
        "CALL",
        "{{ c.function.name }}{% for k, v in c.function.arguments|items %}{{ k }}={{ v }}"
        "{% endfor %}",
    ),
    "joined": WITH_CALLS.replace("CALL", "{{ c.function.name + ' ' + c.function.arguments }}"),
    "printed": WITH_CALLS.replace("CALL", "{{ c.function.name }} {{ c.function.arguments }}"),
}


def made(tmp_path, template, name="tok", **options):
    return load_tokenizer(build_tiny_tokenizer(tmp_path / name, template=template), **options)


def row(**parts):
    return parse_row({"prompt": "Two and two?", "chosen": "4.", "rejected": "5.", **parts})


def call(arguments):
    function = {"name": "weather", "arguments": arguments}
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]


def plain(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("kind", CALLS)
def test_arguments_as_text_and_as_object_give_the_same_tokens_and_are_json(tmp_path, kind):
    tokenizer = made(tmp_path, CALLS[kind])
    arguments = {"city": "Paris", "days": 2, "hot": True}
    texts = []
    for form in (arguments, json.dumps(arguments)):
        pair = tokenize_row(row(chosen=call(form), rejected=plain("No.")), tokenizer)
        texts.append(tokenizer.decode(pair.chosen))
    assert texts[0] == texts[1]
    wanted = "city=Parisdays=2hot=True" if kind == "items" else f" {json.dumps(arguments)}"
    assert f"weather{wanted}</tool_call>" in texts[0]


@pytest.mark.parametrize(
    ("template", "parts", "lost"),
    [
        (R1, {"chosen": "<think>\nTwo twos.\n</think>\n\n4."}, "'Two twos.'|'<think>'"),
        (CHATML, {"chosen": call({"city": "Paris"}), "rejected": plain("No.")}, "'weather'"),
        (
            WITH_CALLS.replace("CALL", "{{ c.function.name }}"),
            {"chosen": call({"city": "Paris"}), "rejected": plain("No.")},
            "'city' of its call",
        ),
        (
            CHATML,
            {"chosen": [{**plain("4.")[0], "reasoning_content": "Why."}], "rejected": plain("5.")},
            "its reasoning_content",
        ),
        (CHATML.replace("message['content']", "message['content'][:3]"), {"chosen": "4. Sure."},
         "'4. Sure.'"),
    ],
)  # fmt: skip
def test_an_answer_that_the_template_writes_in_part_is_refused(tmp_path, template, parts, lost):
    with pytest.raises(RowFault, match=lost) as caught:
        tokenize_row(row(**parts), made(tmp_path, template))
    assert caught.value.kind == "answer part dropped"
    assert "--chat-template FILE" in str(caught.value)


def test_trimming_and_indenting_lose_nothing():
    turn = {"content": "  a\n b ", "tool_calls": [{"name": "f", "arguments": {"x": ["é", 1.5]}}]}
    assert lost_of_answer(turn, 'a b f {"x": ["\\u00e9", 1.5]}') is None
    assert lost_of_answer(turn, "a b f x 1.5") == "'é' of its call of the tool 'f'"
    assert lost_of_prompt([{"role": "system", "content": "Be brief."}], None, "Q") is not None
    thought = [{"role": "assistant", "content": "<think>a</think>\n\nb"}]
    assert lost_of_prompt(thought, None, "b") is None  # as most templates have it
    assert lost_of_prompt([], [{"function": {"name": "f"}}], "no tools") == "the tool 'f'"
    assert added_before({"content": "4."}, "4.<|im_end|>") is None
    assert added_before({"content": "4."}, "<think>\n</think> 4.") == "<think>\n</think>"


def check(record, tokenizer):
    report = check_data({"train": [RawRow(record, "t:1", 0)]}, tokenizer, 512)
    return {finding.kind for finding in report.findings}


def test_what_a_template_leaves_out_of_a_prompt_and_adds_to_an_answer_is_a_finding(tmp_path):
    record = {"prompt": "Two and two?", "chosen": "4.", "rejected": "5."}
    silent = CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages if message.role != 'system' %}",
    )
    assert check({**record, "system": "Be brief."}, made(tmp_path, silent, "a")) == {
        "prompt part dropped"
    }
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert check({**record, "tools": tools}, made(tmp_path, CHATML, "b")) == {"prompt part dropped"}
    assert check(record, made(tmp_path, QWEN3, "c")) == {"added text"}
    off = made(tmp_path, QWEN3, "d", template_kwargs={"enable_thinking": False})
    assert check(record, off) == set()
    pair = tokenize_row(row(), off)
    assert off.decode(pair.chosen) == "4.<|im_end|>\n"


def test_scores_and_repeated_prompts_are_findings(tmp_path):
    tokenizer = made(tmp_path, CHATML)
    record = {"prompt": "How many is two and two?", "chosen": "4.", "rejected": "5."}
    assert check({**record, "score_chosen": 2, "score_rejected": 3}, tokenizer) == {
        "scores disagree"
    }
    assert check({**record, "score_chosen": 3, "score_rejected": 2}, tokenizer) == set()
    twice = {side: f"{record['prompt']} {record[side]}" for side in ("chosen", "rejected")}
    assert check({**record, **twice}, tokenizer) == {"prompt repeated"}


def test_template_variables_change_the_fingerprint_and_a_slip_is_said(tmp_path):
    folder = build_tiny_tokenizer(tmp_path / "tok", template=QWEN3)
    one, other = (
        load_tokenizer(folder),
        load_tokenizer(folder, template_kwargs={"enable_thinking": 0}),
    )
    assert one.fingerprint() != other.fingerprint()
    assert other.notes == ()
    (note,) = load_tokenizer(folder, template_kwargs={"enable_thoughts": False}).notes
    assert "no variable 'enable_thoughts'" in note
    with pytest.raises(ConfigError, match="'tools' is set by the command itself"):
        load_tokenizer(folder, template_kwargs={"tools": []})


def header(folder, **shapes):
    """A model folder whose weights are a header and zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        offsets = [at, at + size]
        entries[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        at += size
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return folder


THINK = {"enable_thinking": False}
GOOD = {"prompt": "Two and two?", "chosen": "4.", "rejected": "5."}


def asking(variables):
    """The column of a row that asks for variables of the template."""
    return {"chat_template_kwargs": variables}


@pytest.mark.parametrize("given", [THINK, json.dumps(THINK), {**THINK, "other": None}])
def test_variables_of_the_template_in_a_row_are_refused_where_the_run_has_others(tmp_path, given):
    """TRL renders such a row with them; they went unseen here."""
    one = row(chat_template_kwargs=given)
    plain = made(tmp_path, QWEN3, "plain")
    said = r"chat_template_kwargs is \{'enable_thinking': False\}.*--chat-template-args '\{\"enable"
    with pytest.raises(RowFault, match=said) as caught:
        tokenize_row(one, plain)
    assert LEVELS[caught.value.kind] == "refused"
    told = made(tmp_path, QWEN3, "told", template_kwargs={**THINK, "more": 1})
    np.testing.assert_array_equal(tokenize_row(one, told).prompt, tokenize_row(row(), told).prompt)


MOOD = CHATML + "{{ mood }}"


@pytest.mark.parametrize(
    ("template", "given"),
    [(CHATML, THINK), (QWEN3, {"enable_thinking": True}), (QWEN3, {"other": 1}), (MOOD, THINK)],
)
def test_variables_in_a_row_that_leave_its_text_as_it_is_are_taken(tmp_path, template, given):
    """Data made for Qwen3 was refused for a model whose template has no such variable."""
    tokenizer = made(tmp_path, template)
    pair, same = (tokenize_row(row(**more), tokenizer) for more in (asking(given), {}))
    for part in ("prompt", "chosen", "rejected"):
        np.testing.assert_array_equal(getattr(pair, part), getattr(same, part))


def test_what_to_give_for_a_row_names_only_what_the_template_reads(tmp_path):
    with pytest.raises(RowFault, match=r"Give --chat-template-args '\{\"mood\": \"glad\"\}', or"):
        tokenize_row(row(**asking({"mood": "glad", **THINK})), made(tmp_path, MOOD))


def test_a_row_that_the_template_takes_only_with_its_variables_says_to_give_them(tmp_path):
    needs = "{% if not mood %}{{ raise_exception('no mood') }}{% endif %}" + CHATML
    with pytest.raises(RowFault, match=r"Give --chat-template-args '\{\"mood\": 1\}', or"):
        tokenize_row(row(**asking({"mood": 1})), made(tmp_path, needs))


def test_a_name_in_a_row_that_no_run_can_give_is_refused_without_saying_to_give_it(tmp_path):
    with pytest.raises(RowFault, match="chat_template_kwargs: 'tools' is set by the") as caught:
        tokenize_row(row(**asking({"tools": ["x"]})), made(tmp_path, CHATML))
    assert "Give" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "asked", "refused"),
    [
        (QWEN3, [{"enable_thinking": True}, THINK], 1),
        (MOOD, [{"mood": "glad"}, {"mood": "sad"}], 2),
    ],
)
def test_of_rows_that_ask_for_different_values_none_is_told_to_give_its_own(
    tmp_path, template, asked, refused
):
    """What suited the one had the other refused, back and forth."""
    tokenizer = made(tmp_path, template)
    rows = [{**GOOD, "prompt": f"{n}?", **asking(own)} for n, own in enumerate(asked)]
    raw = [RawRow(one, f"t:{n}", n) for n, one in enumerate(rows)]
    report = check_data({"train": raw[:1], "valid": raw[1:]}, tokenizer, 512)
    found = [f.what for f in report.findings if f.kind == "template variables"]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(DataError) as caught:
        prepare(path, "train", tokenizer)
    assert len(found) == len(caught.value.faults) == refused
    for what in (*found, *caught.value.faults):
        assert what.endswith("other rows have other values: take the column out")
        assert "--chat-template-args" not in what


def test_rows_that_all_ask_for_the_same_are_told_what_to_give(tmp_path):
    rows = [GOOD, {**GOOD, **asking(THINK)}, {**GOOD, **asking({**THINK, "other": 1})}]
    raw = [RawRow(one, f"t:{n}", n) for n, one in enumerate(rows)]
    found = check_data({"train": raw}, made(tmp_path, QWEN3), 512).findings
    said = [f.what for f in found if f.kind == "template variables"]
    assert len(said) == 2
    assert all("--chat-template-args '{\"enable_thinking\": false}'" in what for what in said)


@pytest.mark.parametrize("given", [None, {}, "", {"enable_thinking": None}])
def test_a_column_of_variables_that_says_nothing_changes_nothing(tmp_path, given):
    tokenize_row(row(chat_template_kwargs=given), made(tmp_path, QWEN3))


def test_a_column_of_variables_that_is_no_object_is_a_fault():
    with pytest.raises(RowFault, match="chat_template_kwargs is a list, wanted an object"):
        row(chat_template_kwargs=[1])


def test_limits_are_the_rows_of_the_matrices_whatever_config_says(tmp_path):
    folder = header(tmp_path / "a", **{"model.embed_tokens": [300, 2], "lm_head": [296, 2],
                                       "vision.embed_tokens": [7, 2]})  # fmt: skip
    (folder / "config.json").write_text('{"vocab_size": 320, "max_position_embeddings": 512}')
    found = model_limits(folder)
    assert (found.vocabulary, found.positions, found.trained) == (296, None, 512)
    folder = header(tmp_path / "b", **{"transformer.wte": [300, 2], "transformer.wpe": [64, 2]})
    assert (model_limits(folder).vocabulary, model_limits(folder).positions) == (300, 64)
    folder = header(tmp_path / "c", **{"model.decoder.embed_positions": [66, 2]})
    (folder / "config.json").write_text('{"model_type": "opt"}')
    assert model_limits(folder).positions == 64
    assert model_limits(tmp_path / "absent").vocabulary is None


def test_a_token_beyond_the_embedding_is_a_fault_of_its_row_alone(tmp_path):
    folder = build_tiny_tokenizer(tmp_path / "tok")
    (folder / "config.json").write_text("{}")
    most = max(load_tokenizer(folder).text_tokens("the capital of France")) + 1
    header(folder, **{"model.embed_tokens": [most - 1, 2]})
    tokenizer = load_tokenizer(folder)
    with pytest.raises(VocabularyFault, match=f"{most - 1} embedding rows"):
        tokenizer.text_tokens("the capital of France")
    rows = [
        RawRow({"prompt": prompt, "chosen": "y", "rejected": "z"}, f"t:{n}", n - 1)
        for n, prompt in ((1, "x"), (2, "the capital of France"))
    ]
    report = check_data({"train": rows}, tokenizer, 512)
    assert [(f.kind, f.where, f.level) for f in report.findings] == [
        ("beyond vocabulary", "t:2", "refused")
    ]


CHAT = [
    {"role": "user", "content": "Name a star."},
    {"role": "assistant", "content": "Sirius."},
    {"role": "user", "content": "Another one?"},
    {"role": "assistant", "content": "Deneb."},
]


INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, QWEN3, PHI3, HEADER_THINKS, R1, INST])
def test_in_a_chat_of_several_turns_the_answers_alone_are_marked(tmp_path, template):
    tokenizer = made(tmp_path, template)
    ids, own = answer_tokens(CHAT, tokenizer)
    assert ids == tokenizer.conversation_tokens(CHAT)
    said = tokenizer.decode([t for t, mine in zip(ids, own, strict=True) if mine])
    parts = said.replace("<|im_end|>", "|").replace("<|endoftext|>", "").replace("\n", "")
    assert parts.replace("<think></think>", "").replace(" ", "") == "Sirius.|Deneb.|"
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
    (item,) = read_documents(
        str(tmp_path / "chat.jsonl"), tokenizer, max_length=512, tokens="response"
    ).items
    assert item.keep[:-1].tolist() == own[1:].tolist()
    assert not item.keep[-1]


def test_a_chat_whose_answers_the_template_rewrites_is_refused_for_the_response_mask(tmp_path):
    turns = [CHAT[0], {"role": "assistant", "content": "<think>a</think>b"}, *CHAT[2:]]
    rewrites = R1 + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    with pytest.raises(DataError, match=r"message 2 \(assistant\) otherwise"):
        answer_tokens(turns, made(tmp_path, rewrites))
