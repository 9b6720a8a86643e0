"""What a setting is: its default, its help, and the facts that help, docs and resume ask for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fpo_mlx.errors import ConfigError

GROUPS = (  # in the order of the help and of the reference of settings
    "data", "model and SAE", "objective", "adapters", "schedule", "memory", "saving", "safety",
    "answers",
)  # fmt: skip


def setting(
    default: Any,
    help: str,
    group: str,
    *,
    first: bool = False,
    path: bool = False,
    yaml_only: bool = False,
    sae_files: bool = False,
    may_change: bool = False,
    by_content: bool = False,
    instead_of: str | None = None,
) -> Any:
    """A field of a settings class.

    first: among the dozen that `--help` shows; path: a place on disk (or a hub id), where YAML may
    write ~; yaml_only: too large for a flag; sae_files: says how an SAE's files are read;
    may_change: a resumed run may have another value; by_content: it may be spelled otherwise, as a
    fingerprint of what it names decides; instead_of: a setting of YAML that a flag of this one
    leaves out, as the two exclude each other.
    """
    if group not in GROUPS:
        raise ValueError(f"{group!r} is no group of settings")
    metadata = {
        "help": help, "group": group, "first": first, "path": path, "yaml_only": yaml_only,
        "sae_files": sae_files, "may_change": may_change, "by_content": by_content,
        "instead_of": instead_of,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        kind = type(default)
        return dataclasses.field(default_factory=lambda: kind(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


COUNTABLE = 1e12  # of a figure that becomes a count; infinity is none


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_finite(config: Any, *names: str) -> None:
    faults = [
        f"--{name.replace('_', '-')} {value}: wanted a finite number."
        for name in names
        if (value := getattr(config, name)) is not None and not math.isfinite(value)
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def check_positive(config: Any, *names: str) -> None:
    faults = [
        f"--{name.replace('_', '-')} {getattr(config, name)}: wanted more than 0."
        for name in names
        if (value := getattr(config, name)) is not None and not value > 0
    ]
    if faults:
        raise ConfigError("\n".join(faults))
