"""Every expected failure. The command line prints the message and exits with `exit_code`.

A message says where, what was found, what was wanted and what to do next. Anything that is not an
`FpoError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence


def pip_install(*packages: str) -> str:
    """What to type to install packages for this Python: a shell may have no pip, or another's."""
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *packages])


class FpoError(Exception):
    """Base of all expected errors."""

    exit_code = 1


class ConfigError(FpoError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class DataError(FpoError):
    """Rows that cannot be trained on. `faults` holds one `file:line: what` text per row."""

    exit_code = 3

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        self.faults = tuple(faults)
        shown = [f"  {fault}" for fault in self.faults[:20]]
        if len(self.faults) > len(shown):
            shown.append(f"  … and {len(self.faults) - len(shown)} more")
        super().__init__("\n".join([message, *shown]))


class SaeError(FpoError):
    """An SAE that cannot be read, or that does not fit the model."""


class ModelError(FpoError):
    """A model or adapter that cannot be loaded, tapped or adapted."""


class CacheMismatch(FpoError):
    """A reference cache that was made for something else."""


class Diverged(FpoError):
    """Training left the region in which it means anything; the last good adapters are kept."""

    exit_code = 4


class Interrupted(FpoError):
    """Ctrl-C, SIGTERM or a closed terminal, after everything was saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
