"""The one place that turns messages into tokens: a tokenizer and its chat template.

Templates run only in the sandboxed Jinja environment of transformers; nothing here touches the
network, and code that comes with a model runs only if the caller asks for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from fpo_mlx.errors import ConfigError, DataError, ModelError
from fpo_mlx.machine.upstream import changed, version
from fpo_mlx.storage.limits import ModelLimits, model_limits

Message = Mapping[str, Any]  # at least {"role": str, "content": str}
Tools = Sequence[Mapping[str, Any]] | None

# Some templates print today's date. Tokens that change overnight would make every cached reference
# score stale, so those templates get this date always (the one Meta's templates fall back to).
TEMPLATE_DATE = "2024-07-26"
_DATE_PARTS = {
    "%Y-%m-%d": TEMPLATE_DATE, "%F": TEMPLATE_DATE, "%Y": "2024", "%y": "24", "%m": "07",
    "%d": "26", "%e": "26", "%-d": "26", "%-m": "7", "%b": "Jul", "%h": "Jul", "%B": "July",
    "%a": "Fri", "%A": "Friday", "%j": "208", "%H": "12", "%I": "12", "%M": "00", "%S": "00",
    "%p": "PM",
}  # fmt: skip
# what transformers' own function takes; a template's variables cannot be called so
_TAKEN = frozenset(
    ("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
     "tokenize", "padding", "continue_final_message", "truncation", "max_length", "return_dict",
     "return_tensors", "tokenizer_kwargs", "return_assistant_tokens_mask",
     "sanitize_control_tokens")
)  # fmt: skip


class VocabularyFault(DataError):
    """A token that the model has no row for."""


@final
@dataclass(frozen=True)
class ChatTokenizer:
    """Messages to tokens. Made by `load_tokenizer`; `raw` is the tokenizer of transformers."""

    raw: Any = field(repr=False)
    templates: Mapping[str, str]  # "default", and "tool_use" where a model has one
    eos_token_ids: tuple[int, ...]  # ascending: every id that ends an answer
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # {"enable_thinking": False}
    source: str = ""
    limits: ModelLimits = ModelLimits()
    notes: tuple[str, ...] = ()  # what a user should know, one sentence each

    def prompt_tokens(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Tokens of messages with the header of the answer to come. Raises DataError."""
        return self.encode([self.render(messages, tools, prompt=True)])[0]

    def conversation_tokens(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Tokens of a whole conversation, what the template adds at the end included.

        Raises DataError.
        """
        return self.encode([self.render(messages, tools)])[0]

    def render(
        self, messages: Sequence[Message], tools: Tools = None, *, prompt: bool = False
    ) -> str:
        """The text that would be tokenized; `prompt` adds the header of the answer.

        Raises DataError.
        """
        if not any(message.get("tool_calls") for message in messages):
            return self._apply(messages, tools, prompt=prompt)
        try:
            text = self._apply(messages, tools, prompt=prompt)
        except DataError:  # DeepSeek's template joins arguments to a text, so they have to be one
            return self._apply(_arguments_as_text(messages), tools, prompt=prompt)
        if _shows_python(messages, text):
            return self._apply(_arguments_as_text(messages), tools, prompt=prompt)
        return text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of rendered texts: no special tokens added; on all cores where they are many.

        Raises VocabularyFault for a token that the model has no row for.
        """
        if not texts:
            return []
        ids = self.raw(
            list(texts), add_special_tokens=False, verbose=False,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        most = self.limits.vocabulary
        if most is not None:
            for one in ids:
                if one and max(one) >= most:
                    raise VocabularyFault(self._beyond(next(i for i in one if i >= most)))
        return ids

    def encode_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(tokens, (first character, end) of each). Raises DataError where it cannot be told."""
        if not self.raw.is_fast:
            raise DataError(f"{self.source}: this tokenizer does not say where its tokens stand")
        (ids,) = self.encode([text])
        found = self.raw(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )["offset_mapping"]
        return ids, [(int(begin), int(end)) for begin, end in found]

    def _beyond(self, token: int) -> str:
        return (
            f"token {token} ({self.raw.convert_ids_to_tokens(token)!r}) is beyond the model's "
            f"vocabulary: {self.limits.vocabulary} embedding rows, {len(self.raw)} tokens in the "
            "tokenizer. Resize the model's embeddings, or take the tokenizer that belongs to it"
        )

    def decode(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        return self.raw.decode(
            [int(token) for token in tokens],
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of plain text: no template, no special tokens added."""
        return self.encode([text])[0]

    @property
    def bos(self) -> list[int]:
        """What stands before every plain text: the BOS, or nothing where there is none."""
        found = getattr(self.raw, "bos_token_id", None)
        return [] if found is None else [found]

    def document_tokens(self, text: str) -> list[int]:
        """Tokens of plain text behind the BOS, which a template would have written."""
        bos, ids = self.bos, self.text_tokens(text)
        return ids if bos and ids[:1] == bos else [*bos, *ids]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as one control token wherever they stand."""
        added = {t.content for t in self.raw.added_tokens_decoder.values() if t.special}
        return tuple(sorted(t for t in added | set(self.raw.all_special_tokens) if len(t) > 1))

    def with_variables(self, more: Mapping[str, Any]) -> ChatTokenizer:
        """The same with more variables for the template, but for those that none mentions.

        Raises ConfigError for a name that is no variable's.
        """
        for name in more:
            _need_variable(name)
        read = {name: more[name] for name in more if _mentioned(name, self.templates)}
        return replace(self, template_kwargs={**self.template_kwargs, **read})

    def fingerprint(self) -> str:
        """sha256 over vocabulary, templates and their settings: whatever can change the tokens."""
        vocabulary = sorted(self.raw.get_vocab().items(), key=lambda item: (item[1], item[0]))
        content = [vocabulary, dict(self.templates), dict(self.template_kwargs), TEMPLATE_DATE]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def encoding_key(self) -> str:
        """sha256 over all that decides tokens and what is said of them: `fingerprint`, the pieces
        of the tokenizer that are no vocabulary, the ends, the model's limits, who renders."""
        backend = getattr(self.raw, "backend_tokenizer", None)
        inner = backend.to_str() if backend is not None else repr(self.raw)
        made_by = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
        content = [self.fingerprint(), inner, self.eos_token_ids, vars(self.limits), made_by]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()

    def _apply(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        try:
            found = self.raw.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=_without_clock(self.templates[name]),
                add_generation_prompt=prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise DataError(
                f"the chat template of {self.source or 'the tokenizer'} refuses a conversation "
                f"with the roles [{roles}]: {_first_line(error)}"
            ) from error
        if type(found) is not str:  # an argument that is ignored by now
            error = TypeError(f"it gave a {type(found).__name__}")
            raise changed("transformers", "apply_chat_template(tokenize=False)", error)
        return found


def load_tokenizer(
    model_path: Path,
    *,
    chat_template: Path | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> ChatTokenizer:
    """Load the tokenizer of a local model folder.

    chat_template: file with a Jinja template that takes the place of the tokenizer's own.
    template_kwargs: variables for the template, such as {"enable_thinking": False}.
    trust_remote_code: run Python code from the folder. Never implied.

    Raises ModelError (no readable tokenizer) and ConfigError (no chat template, or a variable that
    cannot be set).
    """
    model_path = Path(model_path)
    if not model_path.is_dir():
        raise ModelError(
            f"{model_path}: no such folder. The tokenizer is read from a local model folder; "
            "check the path, or give the model as a hub id (owner/name)."
        )
    raw = _open(model_path, trust_remote_code)
    templates = _read_template(chat_template) if chat_template else _own_templates(raw)
    if "default" not in templates:
        raise ConfigError(
            f"{model_path}: this tokenizer has no chat template, so there is no telling how a "
            "prompt and its answer are written for it. Give one with --chat-template FILE "
            "(a Jinja file), or use an instruction-tuned version of the model."
        )
    given = dict(template_kwargs or {})
    notes = tuple(_unused(given, templates))
    limits, eos = model_limits(model_path), _eos_ids(raw, model_path)
    return ChatTokenizer(raw, templates, eos, given, str(model_path), limits, notes)


def _unused(given: Mapping[str, Any], templates: Mapping[str, str]) -> Iterator[str]:
    """Variables that no template looks at: a slip changes nothing, and should not go unseen.

    Raises: ConfigError for a name that is no variable's.
    """
    for name in given:
        _need_variable(name, "--chat-template-args: ")
        if not _mentioned(name, templates):
            yield f"warning: --chat-template-args: the chat template has no variable {name!r}"


def _need_variable(name: str, where: str = "") -> None:
    """Raises ConfigError."""
    if name in _TAKEN:
        raise ConfigError(
            f"{where}{name!r} is set by the command itself. Wanted the template's own variables, "
            'such as {"enable_thinking": false}.'
        )


def _mentioned(name: str, templates: Mapping[str, str]) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in templates.values())


def _open(model_path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(model_path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, …
        hint = "A model folder needs tokenizer.json and tokenizer_config.json; download it again."
        if "trust_remote_code" in str(error):
            hint = "It comes with Python code: --trust-remote-code runs it, if you trust it."
        elif trust_remote_code and ".py" in str(error):
            hint = (
                "fpo-mlx downloads no code: `hf download OWNER/NAME` brings all of the model's "
                "files into the same cache."
            )
        raise ModelError(
            f"{model_path}: the tokenizer cannot be read: {_first_line(error)} {hint}"
        ) from error


def _own_templates(raw: Any) -> dict[str, str]:
    template = raw.chat_template
    if isinstance(template, str):
        return {"default": template}
    return dict(template or {})


def _read_template(path: Path) -> dict[str, str]:
    try:
        return {"default": Path(path).read_text(encoding="utf-8-sig")}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the chat template cannot be read: {error}. "
            "--chat-template wants a Jinja text file in UTF-8."
        ) from error


def _eos_ids(raw: Any, model_path: Path) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of the model's own configuration files."""
    found = {raw.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        try:
            content = json.loads((model_path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a missing or broken file is reported by whoever needs it
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        found.update(value if isinstance(value, list) else [value])
    return tuple(sorted(token for token in found if type(token) is int))


def _without_clock(template: str) -> str:
    """The template with `strftime_now` fixed to TEMPLATE_DATE (see there)."""
    if "strftime_now" not in template:
        return template
    replaced = "format"
    for part, text in _DATE_PARTS.items():
        replaced += f"|replace('{part}','{text}')"
    # "+%}" keeps a newline with which the template itself begins
    return f"{{% macro strftime_now(format) %}}{{{{ {replaced} }}}}{{% endmacro +%}}{template}"


def _arguments_as_text(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with the arguments of their tool calls written as JSON."""
    return [
        {**message, "tool_calls": [_written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _written(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, Mapping):
        return dict(call)
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _shows_python(messages: Sequence[Message], text: str) -> bool:
    """Whether a template printed arguments as Python does, for want of a text: {'a': 'b'}."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            inner = call.get("function") if isinstance(call.get("function"), Mapping) else call
            arguments = inner.get("arguments")
            if arguments and isinstance(arguments, Mapping) and str(dict(arguments)) in text:
                return str(dict(arguments)) != json.dumps(arguments, ensure_ascii=False)
    return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
