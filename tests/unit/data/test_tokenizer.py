"""The tokenizer: templates, tokens, fingerprints, and what it says when it cannot go on."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import CHATML, build_tiny_tokenizer

from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import ConfigError, DataError, ModelError

USER = [{"role": "user", "content": "Hé, 你好?"}]
WHOLE = [*USER, {"role": "assistant", "content": "Fine."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tok"))


def test_a_prompt_ends_with_the_answers_header_and_decodes_to_its_text(folder):
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.prompt_tokens(USER)
    assert all(type(token) is int for token in tokens)
    wanted = "<|im_start|>user\nHé, 你好?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(USER, prompt=True) == wanted
    assert tokenizer.decode(tokens) == wanted


def test_a_conversation_keeps_all_that_the_template_adds_after_the_answer(folder):
    tokenizer = load_tokenizer(folder)
    prompt, whole = tokenizer.prompt_tokens(USER), tokenizer.conversation_tokens(WHOLE)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "Fine.<|im_end|>\n"
    assert tokenizer.decode(whole[len(prompt) :], skip_special=True) == "Fine.\n"


def test_a_plain_text_stands_once_behind_the_bos_where_there_is_one(folder):
    tokenizer = load_tokenizer(folder)
    text = tokenizer.text_tokens("Paris")
    bos = tokenizer.raw.bos_token_id
    assert tokenizer.document_tokens("Paris") == [bos, *text]
    assert tokenizer.document_tokens(f"{tokenizer.raw.bos_token}Paris") == [bos, *text]
    assert tokenizer.document_tokens("") == [bos]
    tokenizer.raw.bos_token = None
    assert tokenizer.document_tokens("Paris") == text
    assert tokenizer.document_tokens("") == []


def test_end_tokens_come_from_the_tokenizer_and_the_models_files(tmp_path):
    folder = build_tiny_tokenizer(tmp_path / "tok")
    assert load_tokenizer(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_tokenizer(folder).eos_token_ids == (2, 5, 7)


def test_the_fingerprint_names_vocabulary_template_and_settings(tmp_path, folder):
    first = load_tokenizer(folder).fingerprint()
    assert load_tokenizer(build_tiny_tokenizer(tmp_path / "same")).fingerprint() == first
    others = [
        load_tokenizer(build_tiny_tokenizer(tmp_path / "small", vocabulary=280)),
        load_tokenizer(build_tiny_tokenizer(tmp_path / "template", template=CHATML + " ")),
        load_tokenizer(folder, template_kwargs={"enable_thinking": False}),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 4


def test_template_settings_reach_the_template(tmp_path):
    template = "{{ messages[0]['content'] }}{% if shout is defined %}{{ shout }}{% endif %}"
    folder = build_tiny_tokenizer(tmp_path / "tok", template=template)
    assert load_tokenizer(folder, template_kwargs={"shout": "!"}).render(USER) == "Hé, 你好?!"


def test_tools_reach_the_template(tmp_path):
    template = "{% for t in tools or [] %}<{{ t['name'] }}>{% endfor %}{{ messages[0].content }}"
    tokenizer = load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=template))
    assert tokenizer.render(USER, [{"name": "clock"}]) == "<clock>Hé, 你好?"
    assert tokenizer.render(USER) == "Hé, 你好?"


def test_a_template_with_todays_date_gives_the_same_tokens_every_day(tmp_path):
    template = "\nToday: {{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}."
    tokenizer = load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=template))
    assert tokenizer.render(USER) == "\nToday: 26 Jul 2024 2024-07-26."


def test_no_chat_template_is_an_error_that_names_the_flag(tmp_path):
    folder = build_tiny_tokenizer(tmp_path / "tok", template=None)
    with pytest.raises(ConfigError, match="--chat-template FILE"):
        load_tokenizer(folder)


def test_control_tokens_are_all_that_are_read_as_one_wherever_they_stand(folder):
    """Llama 3 names three of its control tokens in the configuration, and has hundreds."""
    from transformers import AddedToken

    tokenizer = load_tokenizer(folder)
    assert "<|im_end|>" in tokenizer.control_tokens
    more = [AddedToken("<|header|>", special=True), AddedToken("<|plain|>", special=False)]
    tokenizer.raw.add_tokens(more)
    assert "<|header|>" in tokenizer.control_tokens
    assert "<|plain|>" not in tokenizer.control_tokens


def test_a_chat_template_file_takes_the_place_of_the_models_own(tmp_path, folder):
    bare = build_tiny_tokenizer(tmp_path / "tok", template=None)
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    given = load_tokenizer(bare, chat_template=file)
    assert given.conversation_tokens(WHOLE) == load_tokenizer(folder).conversation_tokens(WHOLE)
    assert given.fingerprint() == load_tokenizer(folder).fingerprint()
    file.write_text(CHATML, encoding="utf-8-sig")  # as some editors write it
    assert load_tokenizer(bare, chat_template=file).fingerprint() == given.fingerprint()
    with pytest.raises(ConfigError, match=r"absent\.jinja: the chat template cannot be read"):
        load_tokenizer(bare, chat_template=tmp_path / "absent.jinja")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "refuses a conversation with the roles"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),  # the sandbox holds
    ],
)
def test_a_template_that_fails_gives_a_data_error(tmp_path, template, said):
    tokenizer = load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=template))
    with pytest.raises(DataError, match=said) as caught:
        tokenizer.prompt_tokens(USER)
    assert "[user]" in str(caught.value)


def test_a_folder_without_a_tokenizer_gives_a_plain_error(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path / "empty")


def test_code_that_was_not_downloaded_is_told_where_it_would_run(tmp_path):
    """--trust-remote-code sent its user to "download it again", which brings no code."""
    folder = build_tiny_tokenizer(tmp_path / "tok")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["absent.Absent", None]}, "tokenizer_class": "Absent"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="downloads no code: `hf download OWNER/NAME`"):
        load_tokenizer(folder, trust_remote_code=True)


def test_code_from_the_model_folder_does_not_run_by_itself(tmp_path):
    folder = build_tiny_tokenizer(tmp_path / "tok")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    try:
        load_tokenizer(folder)
    except ModelError as error:
        assert "--trust-remote-code" in str(error)  # noqa: PT017
    assert not mark.exists()
