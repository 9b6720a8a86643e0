"""What a setting is: its default, its help, and the facts that help, docs and resume ask for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from fpo_mlx.errors import ConfigError

GROUPS = (  # in the order of the help and of the reference of settings
    "data", "model and SAE", "objective", "adapters", "schedule", "memory", "saving", "safety",
    "answers",
)  # fmt: skip


class Bounds(NamedTuple):
    """Between which a setting's numbers lie."""

    above: float = -math.inf
    least: float = -math.inf
    below: float | None = None
    most: float = math.inf

    def hold(self, value: float) -> bool:
        """Whether the value lies within them; NaN lies nowhere."""
        if self == Bounds():
            return True
        inside = self.least <= value <= self.most and value > self.above
        return inside and (self.below is None or value < self.below)

    def __str__(self) -> str:
        finite, low, high = self.below == math.inf, "", ""
        if math.isfinite(self.above):
            low = f"more than {self.above:g}"
        elif math.isfinite(self.least) and math.isfinite(self.most):
            return f"{self.least:g} to {self.most:g}"
        elif math.isfinite(self.least):
            low = f"{self.least:g} or more"
        if math.isfinite(self.most):
            high = f"{self.most:g} at most"
        elif self.below is not None and not finite:
            high = f"less than {self.below:g}"
        return ", ".join(filter(None, ("a finite number" if finite else "", low, high)))


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
    **bounds: float,
) -> Any:
    """A field of a settings class.

    first: among the dozen that `--help` shows; path: a place on disk (or a hub id), where YAML may
    write ~; yaml_only: too large for a flag; sae_files: says how an SAE's files are read;
    may_change: a resumed run may have another value; by_content: it may be spelled otherwise, as a
    fingerprint of what it names decides; instead_of: a setting of YAML that a flag of this one
    leaves out, as the two exclude each other; bounds: those of `Bounds`, which `out_of_bounds`
    looks at (below infinity: any finite number).
    """
    if group not in GROUPS:
        raise ValueError(f"{group!r} is no group of settings")
    metadata = {
        "help": help, "group": group, "first": first, "path": path, "yaml_only": yaml_only,
        "sae_files": sae_files, "may_change": may_change, "by_content": by_content,
        "instead_of": instead_of, "bounds": Bounds(**bounds),
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        kind = type(default)
        return dataclasses.field(default_factory=lambda: kind(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


COUNTABLE = 1e12  # of a figure that becomes a count; infinity is none


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def out_of_bounds(config: Any, flags: bool = True) -> list[str]:
    """The settings of a section that are outside their bounds, in words; None is outside of none.

    flags: name them as the command line does.
    """
    faults = []
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata["bounds"]
        if value is None or isinstance(value, str | dict | tuple) or bounds.hold(value):
            continue
        name = f"--{field.name.replace('_', '-')}" if flags else field.name
        short = f"{value:g}"
        found = short if float(short) == value else value  # rounded, it may lie within them
        faults.append(f"{name} {found}: wanted {bounds}.")
    return faults


def refuse(faults: list[str]) -> None:
    """Raises: ConfigError with all of them."""
    if faults:
        raise ConfigError("\n".join(faults))
