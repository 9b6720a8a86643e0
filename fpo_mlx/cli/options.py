"""Options that are settings, made from the fields of `config`, and what becomes of their values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fpo_mlx.cli.help import GENERAL, Grouped
from fpo_mlx.cli.show import say
from fpo_mlx.config import (
    PRESETS,
    SECTIONS,
    RunConfig,
    Sampling,
    default_of,
    load_config,
    load_section,
    named,
    options,
    read_yaml,
)
from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.storage import files, outputs


class Place(click.Path):
    """A place on disk; ~ is spelled out where the shell did not."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class PlaceOrName(click.types.StringParamType):
    """What a command reads, on disk or on the hub; ~ as above."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return os.path.expanduser(super().convert(value, param, ctx))


PATH, READ = Place(path_type=Path), PlaceOrName()
CLAIM = "fpo_mlx.claim"  # of a click context: claims files for the running command
SILENT = (None, (), "", False, dataclasses.MISSING)  # defaults that say nothing in a help text


def _preset_option(default: str) -> Callable:
    return click.option(
        "--objective", type=click.Choice(list(PRESETS)), cls=Grouped, group="objective",
        help=f"Preset of the objective. [default: {default}]",
    )  # fmt: skip


preset_option = _preset_option("fpo")
judging_preset_option = _preset_option("that of the adapters' training, else fpo")
config_option = click.option(
    "-c", "--config", type=PATH, cls=Grouped, group=GENERAL,
    help="YAML file of settings (underscored names).",
)  # fmt: skip
json_option = click.option("--json", "json_path", type=PATH, help="Write the result here.")
adapter_scale_option = click.option(
    "--adapter-scale", type=float, default=1.0, show_default=True,
    help="Part of the adapter's change that is taken: 0 is the base, 1 the adapter.",
)  # fmt: skip
memory_option = click.option(
    "--memory-gb", type=float,
    help="What programs may use. [default: this machine's; Macs: 2/3 of up to 32 GB, 3/4 above]",
)  # fmt: skip
csv_option = click.option("--csv", "csv_path", type=PATH, help="Write the result here as CSV.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what an earlier command wrote there."
)
overwrite_json_option = click.option(
    "--overwrite", is_flag=True, help="Replace the file of --json; all else goes on where it is."
)
backend_option = click.option(
    "--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True,
    help="What runs the reference model.",
)  # fmt: skip
labels_option = click.option(
    "--labels", type=PATH, help="What features mean: JSON, YAML, CSV or Neuronpedia's export."
)
device_option = click.option("--device", help="Device of the torch backend: cpu, cuda, mps.")


class JsonObject(click.ParamType):
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: Any, ctx: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            found = files.parse_json(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r}: wanted {{"enable_thinking": false}} or the like', param, ctx)
        return found


READING = named("sae_files")  # how the files of an SAE are read


def settings(*parts: type | str) -> Callable:
    """Options for settings, and --config: all that a flag can hold of a section, or one by name."""
    wanted = [
        (field, typing.get_type_hints(section)[field.name])
        for part in parts
        for section in SECTIONS
        for field in dataclasses.fields(section)
        if part in (section, field.name) and not field.metadata["yaml_only"]
    ]

    def decorate(command: Callable) -> Callable:
        for field, hint in reversed(wanted):
            command = _option(field, hint)(command)
        return config_option(command)

    return decorate


def section_options(section: type) -> Callable:
    """Options for all of a settings class that is none of a run's sections, and --config."""
    return lambda command: config_option(_options_of(section)(command))


def some_options(section: type, *names: str) -> Callable:
    """Options for these of its settings, and no --config."""
    return _options_of(section, names)


def _options_of(section: type, names: Sequence[str] = ()) -> Callable:
    """names: of its settings those that are wanted; all where none is named."""
    hints = typing.get_type_hints(section)

    def decorate(command: Callable) -> Callable:
        for field in reversed(dataclasses.fields(section)):
            if not names or field.name in names:
                command = _option(field, hints[field.name])(command)
        return command

    return decorate


def _option(field: dataclasses.Field, hint: Any) -> Callable:
    name = "--" + field.name.replace("_", "-")
    help = field.metadata["help"] + "."
    if field.default not in SILENT:
        help += f" [default: {'on' if hint is bool else field.default}]"
    facts = {name: field.metadata[name] for name in ("group", "first", "may_change")}
    place = {"cls": Grouped, **facts}
    if hint is bool:
        both = f"{name}/--no-{name[2:]}"
        return click.option(both, field.name, default=None, help=help, **place)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return click.option(name, field.name, type=click.Choice(arguments), help=help, **place)
    if field.metadata["path"]:
        place["type"] = READ
    if typing.get_origin(hint) is tuple:
        return click.option(name, field.name, multiple=True, help=help, **place)
    if hint is dict:
        return click.option(name, field.name, type=JsonObject(), help=help, **place)
    kind = next((a for a in arguments if a is not type(None)), hint)
    return click.option(name, field.name, help=help, **{"type": kind, **place})


def pairs_looked_at(split: str) -> Callable:
    """--split, of this default, and --limit: the pairs of --data that a command looks at."""

    def decorate(command: Callable) -> Callable:
        limit = click.option("--limit", type=click.IntRange(min=1), help="Look at this many pairs.")
        return click.option(
            "--split", type=click.Choice(["train", "valid", "test"]), default=split,
            show_default=True, help="Part of the data to look at.",
        )(limit(command))  # fmt: skip

    return decorate


def sampling_options(section: type[Sampling] = Sampling) -> Callable:
    """--max-tokens, --temp and --seed of sampled answers, with the defaults of `section`."""
    return _options_of(section)


def gather_sampling(values: dict[str, Any], section: type[Sampling] = Sampling) -> Sampling:
    """Takes the sampling options out of the values; what was not given is the default."""
    given = {field.name: values.pop(field.name, None) for field in dataclasses.fields(section)}
    return load_section(section, given)


def gather(values: dict[str, Any]) -> RunConfig:
    """Flags that were given, over the YAML file, over the preset, over the defaults."""
    path = values.pop("config", None)
    known = {f.name for section in SECTIONS for f in dataclasses.fields(section)} | {"objective"}
    flags = {k: v for k, v in values.items() if k in known and v not in (None, ())}
    return load_config(flags, path, say)


def claims(*, grows: Mapping[str, str] | None = None, **flags: str) -> Callable:
    """The files that a command's options name (parameter=flag) are claimed before it runs.

    grows: those that are appended to, which may be there and may not be read by the command.
    Stands next to the function, which gets the command's --overwrite if it asks for it.
    """

    def decorate(command: Callable) -> Callable:
        asks = "overwrite" in inspect.signature(command).parameters

        @functools.wraps(command)
        def claimed(*args: Any, overwrite: bool | None = None, **values: Any) -> Any:
            places = {flag: values[name] for name, flag in flags.items()}
            read = _read_by({**flags, **(grows or {})})
            claim = functools.partial(outputs.claim_files, inputs=read, overwrite=bool(overwrite))
            claim(places)
            click.get_current_context().meta[CLAIM] = claim
            for name, flag in (grows or {}).items():
                outputs.refuse_inputs(Path(values[name]), flag, read)
            if asks:
                values["overwrite"] = overwrite
            return command(*args, **values)

        return claimed

    return decorate


def _read_by(written: Mapping[str, str]) -> list[str | Path]:
    """Whatever the options of the running command, and its YAML file, name on this disk.

    What was not given is what YAML says, or the setting's default.
    """
    context, known = click.get_current_context(), options()
    path = context.params.get("config")
    given, found = read_yaml(path) if path else {}, []
    for param in context.command.params:
        name = param.name or ""
        if name in written or not isinstance(param.type, Place | PlaceOrName):
            continue
        value = context.params.get(name) or given.get(name)
        if not value and name in known and known[name].metadata["path"]:
            value = default_of(known[name])
        found += [v for v in _each(value) if isinstance(v, str | Path)]
    for name, value in given.items():
        if name not in known or known[name].metadata["path"]:
            found += [v for v in _each(value) if type(v) is str]
    # FILE.py:FUNCTION of --reward names a file
    return [*found, *(v.rpartition(":")[0] for v in found if type(v) is str and ":" in v)]


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def put(path: Path, write: Callable[[Path], object]) -> Path:
    """Have a result written; gives the name that `write` was given.

    Where the place was taken since the command claimed it, that is a free name beside it.
    Raises: FpoError when the place that the user named cannot be written to.
    """
    context = click.get_current_context(silent=True)
    claim = context.meta.get(CLAIM) if context else None
    beside = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    name = next(
        name for name in itertools.chain([path], beside) if claim is None or _free(name, claim)
    )
    if name != path:
        say(f"{path} was written by another meanwhile, and is kept: the result is in {name}")
    try:
        write(name)
    except OSError as error:
        raise FpoError(f"{name} cannot be written: {error.strerror or error}.") from error
    return name


def _free(place: Path, claim: Callable[[dict[str, Path]], None]) -> bool:
    try:
        claim({"": place})
    except ConfigError:
        return False
    return True


def write_text(path: Path, text: str) -> Path:
    return put(path, lambda name: files.write_text(name, text))


def write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        write_text(path, files.json_text(value))


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    if path is not None:
        from fpo_mlx.data.feature_files import csv_text

        write_text(path, csv_text(rows))
