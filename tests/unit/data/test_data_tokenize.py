"""Rows to token pairs: the split at the prompt, the length rule, the fingerprint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, build_tiny_tokenizer
from tokenized import tokenize_rows

from fpo_mlx.data import data_fingerprint, pair_lengths, parse_row, tokenize_row
from fpo_mlx.data.rows import RowFault
from fpo_mlx.data.tokenize import PrefixFault, truncate_pairs
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.records import NO_FACTS, PairFacts, TokenPair


def row(prompt="What?", chosen="This.", rejected="That.", number=1):
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return parse_row(record, where=f"train.jsonl:{number}", index=number - 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def other(tmp_path, template):
    return load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=template))


def test_a_response_is_the_conversation_behind_the_prompt(tokenizer):
    result = tokenize_rows([row(), row("Why?", "So é.", "No.", 2)], tokenizer, 512)
    first, second = result.pairs
    assert tokenizer.decode(first.prompt) == (
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(first.chosen) == "This.<|im_end|>\n"
    assert tokenizer.decode(second.chosen) == "So é.<|im_end|>\n"
    assert {a.dtype for a in (first.prompt, first.chosen, first.rejected)} == {np.dtype("int32")}
    assert (second.index, second.where) == (1, "train.jsonl:2")
    assert result.report.lines() == []
    assert (result.report.rows, result.report.pairs) == (2, 2)
    assert result.report.longest == max(
        len(pair.prompt) + max(map(len, pair.responses)) for pair in result.pairs
    )
    assert list(pair_lengths(result.pairs)) == [
        len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in result.pairs
    ]


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_prompt_and_response_together_are_the_rendered_conversation(tokenizer, prompt, answer):
    try:
        made = row(prompt, answer, answer + "!")
        pair = tokenize_row(made, tokenizer)
    except RowFault as fault:
        melts = answer[0].isspace()
        empty = not (prompt.strip() and answer.strip())
        assert melts or empty or "Human:" in prompt, fault  # noqa: PT017
        return
    for turns, response in ((made.chosen, pair.chosen), (made.rejected, pair.rejected)):
        whole = tokenizer.conversation_tokens((*made.prompt, *turns))
        assert [*pair.prompt, *response] == whole
        text = tokenizer.render((*made.prompt, *turns))
        assert tokenizer.decode([*pair.prompt, *response]) == text


def numbers(*parts):
    arrays = (np.arange(n, dtype=np.int32) + 10 * at for at, n in enumerate(parts))
    return TokenPair(*arrays, index=0, where="train.jsonl:1")


def test_the_length_rule_by_hand():
    # prompt 4, chosen 3, rejected 6: room for 4 within 8, for 1 within 5, for none within 4
    pair = numbers(4, 3, 6)
    whole = truncate_pairs([pair], 10)
    assert whole.report.cut == ()
    assert whole.report.longest == 10
    cut = truncate_pairs([pair], 8)
    assert [len(part) for part in cut.pairs[0].responses] == [3, 4]
    assert cut.pairs[0].rejected.tolist() == [20, 21, 22, 23]
    assert list(map(str, cut.report.cut)) == ["train.jsonl:1: rejected cut from 6 to 4 tokens"]
    least = truncate_pairs([pair], 5)
    assert [len(part) for part in least.pairs[0].responses] == [1, 1]
    assert [item.response for item in least.report.cut] == ["chosen", "rejected"]
    none = truncate_pairs([pair], 4)
    assert none.pairs == []
    assert list(map(str, none.report.dropped)) == [
        "train.jsonl:1: dropped, its prompt alone has 4 tokens"
    ]


def test_the_report_counts_what_was_lost_in_words(tokenizer):
    rows = [
        row("Hm?", "Yes, yes", "No, no"),
        row("x" * 99, number=2),
        row("Hm?", "same start a", "same start b", 3),
    ]
    room = len(tokenizer.prompt_tokens(rows[2].prompt)) + 3
    result = tokenize_rows(rows, tokenizer, room)
    assert [pair.where for pair in result.pairs] == ["train.jsonl:1", "train.jsonl:3"]
    assert result.report.same_after_cut == ("train.jsonl:3",)
    cut, dropped, same = result.report.lines()
    assert cut.startswith("4 responses of 2 pairs are cut at")
    assert dropped.startswith("1 of 3 pairs are dropped")
    assert same.startswith("1 pairs teach nothing")
    assert [drop.where for drop in result.report.dropped] == ["train.jsonl:2"]


def test_nothing_left_is_refused(tokenizer):
    with pytest.raises(DataError, match="no pair is left of 2.*--max-seq-length"):
        tokenize_rows([row(), row(number=2)], tokenizer, 3)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        tokenize_rows([row()], tokenizer, 1)


def test_a_template_that_rewrites_the_prompt_is_refused_with_both_texts(tmp_path):
    thinks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = other(tmp_path, thinks)
    with pytest.raises(DataError) as caught:
        tokenize_rows([row(), row("Why?", number=2)], tokenizer, 512)
    text = str(caught.value)
    assert "2 of 2 rows cannot be tokenized" in text
    assert (
        "  prompt: '<|im_start|>user\\nWhat?<|im_end|>\\n<|im_start|>assistant\\n<think>'\n" in text
    )
    assert "  whole:  '<|im_start|>user\\nWhat?<|im_end|>\\n<|im_start|>assistant\\nThis." in text
    assert "--chat-template FILE" in text
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [
        "train.jsonl:1",
        "train.jsonl:2",
    ]


def test_an_answer_whose_first_characters_melt_into_the_prompt_is_named(tmp_path):
    # a template that ends the prompt within a word: "an" + "swer" has other tokens than "answer"
    tokenizer = other(tmp_path, "{{ messages[0].content }} {% if messages|length > 1 %}"
                                "{{ messages[1].content }}{% endif %}")  # fmt: skip
    with pytest.raises(PrefixFault, match="chosen melt into one token"):
        tokenize_row(row("The", "capital", "question"), tokenizer)


def test_a_template_that_refuses_a_row_is_a_fault_of_that_row(tmp_path):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + CHATML
    )
    tokenizer = other(tmp_path, template)
    bad = parse_row(
        {"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}, where="train.jsonl:2"
    )
    with pytest.raises(DataError) as caught:
        tokenize_rows([row(), bad], tokenizer, 512)
    (fault,) = caught.value.faults
    assert fault.startswith("train.jsonl:2: the chat template of ")
    assert "refuses a conversation with the roles [system, user]: System role not supp" in fault


NO_SYSTEM = (
    "{% if messages[0]['role'] in ('system', 'developer') %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ENDS = "{{ raise_exception('No more') }}"


@pytest.mark.parametrize(
    ("template", "first", "helps"),
    [
        (NO_SYSTEM, "system", True),
        (NO_SYSTEM, "developer", True),
        (NO_SYSTEM + ENDS, "system", False),  # refused without its system message, too
        (ENDS, "user", False),
    ],
)
def test_a_row_that_is_taken_without_its_system_message_is_told_where_its_words_go(
    tmp_path, template, first, helps
):
    """Gemma 2's template: all that was said was to leave such rows out."""
    turns = [{"role": "user", "content": "Q"}]
    if first != "user":
        turns.insert(0, {"role": first, "content": "Be brief."})
    answers = {
        name: [{"role": "assistant", "content": text}]
        for name, text in {"chosen": "A", "rejected": "B"}.items()
    }
    bad = parse_row({"prompt": turns, **answers})
    with pytest.raises(RowFault) as caught:
        tokenize_row(bad, other(tmp_path, template))
    said = f"without its {first} message the row is taken: put those words before the user's first"
    assert (said in str(caught.value)) is helps
    assert caught.value.kind == "template"


def test_answers_that_the_template_makes_equal_or_empty_are_faults(tmp_path):
    trims = CHATML.replace("message['content'] }}", "message['content'] | trim }}")
    with pytest.raises(RowFault, match="the same tokens") as caught:
        tokenize_row(row("Q", "A", "A "), other(tmp_path / "a", trims))
    assert caught.value.kind == "same response"
    silent = "{{ messages[0].content }}"
    with pytest.raises(RowFault, match="makes nothing of chosen"):
        tokenize_row(row(), other(tmp_path / "b", silent))
    answers = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowFault, match="makes nothing of the prompt"):
        tokenize_row(row(), other(tmp_path / "c", answers))


def test_the_fingerprint_follows_tokens_and_order(tokenizer):
    pairs = tokenize_rows([row(), row("Why?", number=2)], tokenizer, 512).pairs
    first = data_fingerprint(pairs)
    assert (
        data_fingerprint(tokenize_rows([row(number=7), row("Why?")], tokenizer, 64).pairs) == first
    )
    assert data_fingerprint(pairs[::-1]) != first
    assert data_fingerprint(pairs[:1]) != first
    swapped = [TokenPair(p.prompt, p.rejected, p.chosen, p.index, p.where) for p in pairs]
    assert data_fingerprint(swapped) != first


def test_what_a_row_says_of_its_pair_is_in_the_fingerprint(tokenizer):
    (pair,) = tokenize_rows([row()], tokenizer, 512).pairs
    said = (NO_FACTS, PairFacts(agreement=0.5), PairFacts(weight=0.5), PairFacts(score_gap=0.5))
    assert len({data_fingerprint([replace(pair, facts=facts)]) for facts in said}) == 4
