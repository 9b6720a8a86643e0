"""How help looks: options in the groups of the settings, the dozen that matter first."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import click
from rich_click import (
    RichCommand,
    RichCommandPanel,
    RichGroup,
    RichHelpConfiguration,
    RichOption,
    RichOptionPanel,
)

from fpo_mlx.config import GROUPS

OWN, GENERAL, ARGUMENTS = "Options", "General", "Arguments"
SHORT = 18  # a command with no more options than this shows them all at once
PLACES = "Of a file that is named its place may change, not what is in it."
_HOW = ("resume", "overwrite")
ALL = "fpo_mlx.help_all"  # key of click's context: every option was asked for

LOOK = RichHelpConfiguration(
    theme="default-slim", default_string="\\[default: {}]",
    options_table_column_types=["opt_all_metavar", "help"],
)  # fmt: skip
CONTEXT = {"help_option_names": ["-h", "--help"], "rich_help_config": LOOK}


class Grouped(RichOption):
    """An option in a named group of the help; one that is not `first` waits for --help-all.

    may_change: a resumed run may have another value.
    """

    def __init__(
        self, *args: Any, group: str, first: bool = True, may_change: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, panel=group, **kwargs)
        self.first, self.may_change = first, may_change


def _help_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _typed(ctx: click.Context) -> str:
    """The command's own words, "sae train", however the program was begun."""
    above = f"{_typed(ctx.parent)} " if ctx.parent and ctx.parent.parent else ""
    return above + (ctx.info_name or "")


class Command(RichCommand):
    """A command whose `--help` is short and whose `--help-all` is whole.

    What the device could not do for it becomes an error with what this command can do about it.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RuntimeError as error:  # click's Exit is one, too
            from fpo_mlx.cli import trouble

            options = {param.name or "" for param in self.params}
            if (plain := trouble.plain(error, _typed(ctx), options)) is not None:
                raise plain from error
            raise

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        if not any(isinstance(param, Grouped) for param in params):
            return params
        more = Grouped(
            ["--help-all"], group=GENERAL, is_flag=True, is_eager=True, expose_value=False,
            callback=_help_all, help="Show every option and exit.",
        )  # fmt: skip
        return [*params, more]

    def get_help(self, ctx: click.Context) -> str:
        """Without the spaces that fill each line up to the terminal's width."""
        return _unfilled(super().get_help(ctx))

    def get_usage(self, ctx: click.Context) -> str:
        """What stands above the error of a wrong flag; the same."""
        return _unfilled(super().get_usage(ctx)).strip()

    def format_help_text(self, ctx: click.Context, formatter: Any) -> None:
        """Paragraphs; one that begins with \\b keeps its lines, as click has it."""
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            kept = paragraph.removeprefix("\b\n")
            text = paragraph.replace("\n", " ") if kept == paragraph else kept
            formatter.write(formatter.highlighter(text + "\n"))

    def format_options(self, ctx: click.Context, formatter: Any) -> None:
        given = [p for p in self.get_params(ctx) if not getattr(p, "hidden", False)]
        whole = ctx.meta.get(ALL, False)
        shown = shown_of(given, everything=whole)
        for title, names in grouped(shown):
            formatter.write(RichOptionPanel(title, names).render(self, ctx, formatter))  # type: ignore
        if left := len(given) - len(shown):
            formatter.write(f"{left} more settings: {ctx.command_path} --help-all")
        if whole and (free := changeable(given)):
            formatter.write(f"May change on --resume: {', '.join(free)}.\n{PLACES}")


def _unfilled(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


class Group(Command, RichGroup):
    """A group of such commands, in the order in which they were added, stage by stage."""

    command_class = Command

    def main(self, *args: Any, **extra: Any) -> Any:
        """click's own: an error is a plain line, which a script can read, and not a box."""
        return super(RichCommand, self).main(*args, **extra)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Raises: UsageError for options of the group before a subcommand, which has its own."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_before(ctx, command)
        return name, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: Any) -> None:
        titles: dict[str, list[str]] = {}
        for name in self.list_commands(ctx):
            for title in self._panel_command_mapping.get(name, ["Commands"]):
                titles.setdefault(title, []).append(name)
        for title, names in titles.items():
            formatter.write(RichCommandPanel(title, names).render(self, ctx, formatter))  # type: ignore
        super().format_options(ctx, formatter)


def _refuse_before(ctx: click.Context, command: click.Command) -> None:
    typed, known = click.core.ParameterSource.COMMANDLINE, {p.name for p in command.params}
    given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") is typed]
    behind = [param.opts[-1] for param in given if param.name in known]
    lacking = [param.opts[-1] for param in given if param.name not in known]
    own, faults = f"{ctx.command_path} {command.name}", []
    if behind:
        better = f"`{own} {' … '.join(behind)} …`"
        faults.append(f"{', '.join(behind)} before `{command.name}` would not be seen: {better}.")
    if lacking:
        faults.append(f"{', '.join(lacking)}: `{own}` has no such option; leave it out.")
    if faults:
        raise click.UsageError(" ".join(faults), ctx)


def shown_of(params: Iterable[click.Parameter], *, everything: bool) -> list[click.Parameter]:
    """What a help text shows: all where that is little or asked for, else what comes first."""
    params = list(params)
    if everything or len(params) <= SHORT:
        return params
    return [p for p in params if getattr(p, "first", True)]


def changeable(params: Iterable[click.Parameter]) -> list[str]:
    """What a resumed run may have another value of; nothing for a command that resumes none."""
    free = {p.name: p.opts[0] for p in params if getattr(p, "may_change", False)}
    # these two say what becomes of the older run
    return [flag for name, flag in free.items() if name not in _HOW] if "resume" in free else []


def grouped(params: Iterable[click.Parameter]) -> Iterator[tuple[str, list[str]]]:
    """Titles and the names under them: arguments, the command's own, the settings, the rest."""
    found: dict[str, list[str]] = {}
    for param in params:
        found.setdefault(_title(param), []).append(param.opts[0])
    order = (ARGUMENTS, OWN, *GROUPS, GENERAL)
    for group in sorted(found, key=order.index):
        yield group[0].upper() + group[1:], found[group]


def _title(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        return ARGUMENTS
    if isinstance(param, Grouped):
        return str(param.panel)
    return GENERAL if {"--help", "--version"} & set(param.opts) else OWN
