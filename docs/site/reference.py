"""The reference of commands and settings, from click's definitions and from fpo_mlx/config."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import click

from fpo_mlx.cli import main
from fpo_mlx.config import GROUPS, PRESETS, SECTIONS, SaeTrainConfig, Sampling

SETTINGS_HEAD = ("setting", "values", "default", "meaning", "may change on `--resume`")
SAE_TRAINING = "SAE training"
LAST = "General"  # group of the options that all commands have


def commands() -> str:
    """Every command under a heading: its help, its usage, a table of its options."""
    return "\n".join(part for path, command in leaves(main, ()) for part in one(path, command))


def leaves(
    group: click.Group, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*path, name), command
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))


def one(path: tuple[str, ...], command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(("fpo-mlx", *path)))
    yield f"## {' '.join(path)}\n"
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    yield f"```text\n{usage}\n```\n"
    yield from paragraphs(command.help or "")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for option in command.params:
        if isinstance(option, click.Option):
            title = (
                getattr(option, "panel", None) or "options"
            )  # the help's groups, where it has them
            groups.setdefault(title, []).append((flags(option, context), sentence(option)))
    for title in sorted(groups, key=place):
        yield table((heading(title), "meaning"), groups[title])


def place(title: str) -> int:
    """A command's own options first, then its settings as the configuration has them."""
    order = (*GROUPS, LAST)
    return order.index(title) if title in order else -1


def paragraphs(help: str) -> Iterator[str]:
    """Help text as Markdown; a paragraph that begins with a line of \\b keeps its lines."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(help).split("\f")[0]):
        lines = paragraph.strip("\n").splitlines()
        if lines[0].strip() == "\b":
            yield "```text\n" + "\n".join(lines[1:]) + "\n```\n"
        else:
            yield prose(" ".join(line.strip() for line in lines)) + "\n"


def flags(option: click.Option, context: click.Context) -> str:
    names = [f"`{name}`" for name in (*option.opts, *option.secondary_opts)]
    if option.is_flag:
        return ", ".join(names)
    kind = option.type
    if isinstance(kind, click.Choice):
        values = ", ".join(f"`{choice}`" for choice in kind.choices)
    else:
        values = f"`{option.make_metavar(context)}`"
    return f"{', '.join(names)}: {values}"


def sentence(option: click.Option) -> str:
    """Its help, and its default where the help does not say it."""
    said = prose(option.help or "")
    default = option.default
    if option.show_default and isinstance(default, str | int | float) and "default" not in said:
        said += f" \\[default: {default}\\]"
    return said + (" Repeatable." if option.multiple and "repeatable" not in said.lower() else "")


def settings() -> str:
    """Every setting of a run by group, then those of SAE training."""
    parts = []
    for group in GROUPS:
        rows = [
            row(field, hint)
            for section in (*SECTIONS, Sampling)
            for field, hint in hints(section)
            if field.metadata["group"] == group
        ]
        if group == "objective":
            choices = ", ".join(f"`{name}`" for name in PRESETS)
            rows.insert(0, ("`objective`", choices, "`fpo`", "preset of the objective", "no"))
        parts += [f"### {heading(group)}\n", table(SETTINGS_HEAD, rows)]
    of_sae = [row(field, hint) for field, hint in hints(SaeTrainConfig)]
    return "\n".join([*parts, f"### {SAE_TRAINING}\n", table(SETTINGS_HEAD, of_sae)])


def heading(group: str) -> str:
    return group[0].upper() + group[1:]


def hints(section: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        yield field, kinds[field.name]


def row(field: dataclasses.Field, hint: Any) -> tuple[str, ...]:
    facts = field.metadata
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    name = f"`{field.name}`" + (" (only in YAML)" if facts["yaml_only"] else "")
    shown = (
        "" if default in (None, "", (), {}, []) and default is not False else f"`{plain(default)}`"
    )
    bounds = str(facts["bounds"]).removeprefix("a finite number").removeprefix(", ")
    kinds = ", ".join(filter(None, (values(hint), bounds)))
    return (name, kinds, shown, prose(facts["help"]), "yes" if facts["may_change"] else "no")


def plain(value: Any) -> str:
    """As YAML would have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def values(hint: Any) -> str:
    """What a setting may be, in words or as its choices."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if typing.get_origin(hint) is tuple:
        return "list of texts"
    kinds = [kind for kind in inner or (hint,) if kind is not type(None)]
    words = {bool: "true, false", int: "integer", float: "number", str: "text", dict: "mapping"}
    return " or ".join(words.get(typing.get_origin(kind) or kind, str(kind)) for kind in kinds)


def prose(text: str) -> str:
    """Help as Markdown: flags as code, nothing read as markup."""
    text = re.sub(r"([\[\]<>|*_])", r"\\\1", re.sub(r"\s+", " ", text).strip())
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]+)", r"`\1`", text)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
