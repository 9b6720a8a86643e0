"""Settings from the command line over YAML over a preset over defaults; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fpo_mlx.config.objective import PRESETS, Objective
from fpo_mlx.config.sections import SECTIONS, RunConfig, default_of, named, options
from fpo_mlx.errors import ConfigError

Section = TypeVar("Section")
# settings that name parts of a data set
PARTS = ("train_split", "valid_split", "test_split", "subset", "valid_share")
Say = Callable[[str], None]
_INSTEAD = {  # settings of mlx_lm.lora that training has none of
    "train": "leave it out; `fpo-mlx train` trains",
    "test": "leave it out; `fpo-mlx evaluate` judges the test split",
    "test_batches": "leave it out; `fpo-mlx evaluate` judges all pairs of the split",
    "resume_adapter_file": "write init_adapter, and the folder that the file lies in",
    "mask_prompt": "leave it out; the answers alone are trained on",
    "clear_cache_threshold": "leave it out; nothing takes its place",
    "config": "leave it out; one file has all settings",
    "lora_layers": "write num_layers",
    "use_dora": "write fine_tune_type: dora",
}


def load_config(
    flags: Mapping[str, Any], path: Path | None = None, say: Say = lambda _: None
) -> RunConfig:
    """Settings from flags that were given (not None) over those of a YAML file over defaults.

    say: told where flags and file do not simply add up: what of the file a flag leaves out, and
    what stays of it in an objective that a flag chose.
    Raises: ConfigError for unknown keys, wrong types and values out of range, all at once.
    """
    yaml = _written(path, SECTIONS, "objective")
    given = _given(flags, yaml, path, SECTIONS, say, "objective")
    asked = frozenset(given) & {"objective", *options((Objective,))}
    preset = given.pop("objective", "fpo")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"--objective {preset}: wanted one of {', '.join(PRESETS)}.")
    values = _typed({**PRESETS[preset], **given}, SECTIONS)
    if preset != yaml.get("objective", "fpo"):
        _tell_parts(
            preset, {n: values[n] for n in _PARTS_OF_PRESETS if n in yaml}, flags, path, say
        )
    sections = [
        section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
        for section in SECTIONS
    ]
    flagged = frozenset(name for name, value in flags.items() if value is not None)
    return RunConfig(*sections, preset=preset, asked=asked, flagged=flagged)  # type: ignore[arg-type]


def load_section(
    section: type[Section],
    flags: Mapping[str, Any],
    path: Path | None = None,
    say: Say = lambda _: None,
) -> Section:
    """The same for a settings class that stands alone, as `SaeTrainConfig` and `Sampling` do."""
    yaml = _written(path, (section,))
    return section(**_typed(_given(flags, yaml, path, (section,), say), (section,)))


def _written(path: Path | None, sections: Sequence[type], *more: str) -> dict[str, Any]:
    """The settings of a YAML file. As in mlx_lm.lora null is none, but where it is a value."""
    yaml = read_yaml(path) if path else {}
    hints = {n: hint for s in sections for n, hint in typing.get_type_hints(s).items()}
    plain = {n for n, hint in hints.items() if type(None) not in typing.get_args(hint)}
    return {n: v for n, v in yaml.items() if v is not None or n not in {*plain, *more, *_INSTEAD}}


def _given(
    flags: Mapping[str, Any],
    yaml: Mapping[str, Any],
    path: Path | None,
    sections: Sequence[type],
    say: Say,
    *more: str,
) -> dict[str, Any]:
    """Flags that were given over the settings of a YAML file. Raises: ConfigError.

    more: names that are known beside the settings of the sections.
    """
    fields, given = options(sections), dict(yaml)
    known = {*fields, *more}
    if unknown := sorted({*given, *flags} - known):
        where = f"{path}: " if set(unknown) & set(given) else ""
        told = [f" {n}: {_INSTEAD[n]}." for n in unknown if n in _INSTEAD and "iters" in known]
        near = "".join(told) or _closest(unknown[0], known)
        raise ConfigError(f"{where}unknown settings {', '.join(unknown)}.{near}")
    other = flags.get("data")
    if is_other(given.get("data"), other) and Path(str(other)).expanduser().exists():
        if (share := given.get("valid_share")) and flags.get("valid_share") is None:
            say(f"valid_share {share} of {path} is of its own data, not of {other}: left out")
        given = {name: value for name, value in given.items() if name not in PARTS}
    flags = {name: value for name, value in flags.items() if value is not None}
    for name in (name for name, value in flags.items() if value):  # a share of 0 is none
        old = (fields[name].metadata["instead_of"] if name in fields else None) or ""
        if given.get(old) is not None and old not in flags:
            say(f"{_flag(name)} {flags[name]} stands in the place of {old} of {path}")
            del given[old]
    return given | flags


_PARTS_OF_PRESETS = {name: None for preset in PRESETS.values() for name in preset}
_HELD = ("alpha", "stop_gradient")  # nothing without a constraint


def _tell_parts(
    preset: str, yaml: Mapping[str, Any], flags: Mapping[str, Any], path: Path | None, say: Say
) -> None:
    """Say which parts of a preset that a flag chose are those of the YAML file."""
    own = {name: default_of(field) for name, field in options((Objective,)).items()}
    own |= PRESETS[preset]
    constraint = flags.get("constraint") or yaml.get("constraint") or own["constraint"]
    idle = _HELD if constraint == "none" else ()
    other = [
        f"{name} {value} ({preset}: {own[name]})"
        for name, value in yaml.items()
        if name not in idle and flags.get(name) is None and value != own[name]
    ]
    if other:
        say(f"--objective {preset}: {path} has parts of its own, which stand: {', '.join(other)}")


def is_other(own: Any, other: Any) -> bool:
    """Whether both name data, and not the same: PARTS of one are not those of the other."""
    places = [Path(str(name)).expanduser().resolve() for name in (own, other) if name]
    return len(places) == 2 and places[0] != places[1]


def _typed(given: Mapping[str, Any], sections: Sequence[type]) -> dict[str, Any]:
    """Every value as its setting declares it, ~ of paths spelled out. Raises: ConfigError."""
    hints: dict[str, Any] = {}
    for section in sections:
        hints |= typing.get_type_hints(section)
    faults, values = [], {}
    for name, value in given.items():
        try:
            values[name] = coerce(name, value, hints[name])
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    for name in named("path", sections):  # a shell does this for flags, nobody for YAML
        if isinstance(path := values.get(name), str):
            values[name] = os.path.expanduser(path)
    return values


def coerce(name: str, value: Any, hint: Any) -> Any:
    """YAML reads 1e-5 as text and [a] as a list: bring a value to its declared type.

    Raises ConfigError.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return coerce(name, value, next(a for a in arguments if a is not type(None)))
    flag = _flag(name)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(f"{flag} {value}: wanted one of {', '.join(arguments)}.")
        return value
    if origin is tuple:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{flag} {value!r}: wanted a text or a list of texts.")
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):  # infinity is a bound that is never reached
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {
        float: "a number", int: "a whole number", bool: "true or false", str: "a text",
        dict: "a mapping, {name: value}",
    }  # fmt: skip
    raise ConfigError(f"{flag} {value!r}: wanted {wanted.get(hint, hint)}.")


def _flag(name: str) -> str:
    """What a user writes for a setting."""
    return name if name in named("yaml_only") else "--" + name.replace("_", "-")


def read_yaml(path: Path) -> dict[str, Any]:
    """The top level of a YAML file. Raises ConfigError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers: 1e-5 is one, which PyYAML reads as text. No key stands twice."""

        def flatten_mapping(self, node: Any) -> None:
            if node in looked_at:  # what it merges stands in it by now
                return super().flatten_mapping(node)
            looked_at.append(node)
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in lines:
                    raise ConfigError(
                        f"{path}: {key.value} stands there twice, in line {lines[key.value]} and "
                        f"in line {line}. Remove one of them."
                    )
                lines[str(key.value)] = line
            return super().flatten_mapping(node)

    looked_at: list[Any] = []
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Wanted a YAML file of settings.") from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as YAML: nested too deeply") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {type(value).__name__}, wanted `setting: value` lines.")
    return {str(key): v for key, v in value.items()}


def _closest(unknown: str, known: Collection[str]) -> str:
    import difflib

    near = difflib.get_close_matches(unknown, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
