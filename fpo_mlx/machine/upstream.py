"""Which versions of other packages were tried, and plain words where one of them has changed.

The ranges stand in pyproject.toml alone; here they are read back from the installed package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fpo_mlx.errors import ModelError, pip_install

OURS = "fpo-mlx"
WORKSHOP = {"dev", "docs"}  # extras of those who work on fpo-mlx: nothing of them runs in it
BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # builds of one library file
LEANED_ON = {"mlx": "mlx", "mlx_lm": "mlx-lm", "transformers": "transformers"}  # module -> package
# What MLX's RuntimeErrors begin with where a device cannot do what it was asked, as of 0.32:
# mlx/backend/metal/{allocator,device}.cpp, with Metal's own words behind the colon; and CUDA's
_RAN = "[METAL] Command buffer execution failed: "
_NO_ROOM = (
    f"{_RAN}Insufficient Memory", "[metal::malloc] Attempting to allocate ",
    "[malloc] Unable to allocate ",
)  # fmt: skip
_TOO_LONG = (f"{_RAN}Caused GPU Timeout", f"{_RAN}Impacting Interactivity")
_NO_METAL = "[metal::load_device] No Metal device available"
_CUDA = ("cudaMalloc", " failed: out of memory")  # how it begins, how it ends
NO_SESSION = "Run it in the plain Terminal of a person who is logged in, not in a VM or a sandbox."


@dataclass(frozen=True)
class Tested:
    """One package that is installed, and the versions of it that were tried."""

    package: str
    installed: str
    range: str  # as pip takes it: ">=5.21,<5.25"
    inside: bool


def tested() -> list[Tested]:
    """Of every package that fpo-mlx runs with, its extras' included, as far as it is installed."""
    found: dict[str, Tested] = {}
    for requirement in _requirements():
        installed = version(requirement.name)
        if installed and requirement.specifier and requirement.name not in found:
            inside = requirement.specifier.contains(installed, prereleases=True)
            text = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            found[requirement.name] = Tested(requirement.name, installed, text, inside)
    return list(found.values())


def outside() -> list[Tested]:
    """Those whose installed version nobody tried."""
    return [one for one in tested() if not one.inside]


def changed(package: str, what: str, error: Exception) -> ModelError:
    """The error for something of another package that is no longer as it was."""
    one = next((t for t in tested() if t.package == package), None)
    found = f"{package} {one.installed}" if one else package
    advice = "Please report it."
    if one and not one.inside:
        advice = f"Tried were versions {one.range}: {pip_install(f'{package}{one.range}')}"
    return ModelError(f"{found} has changed what fpo-mlx uses of it, {what}: {error}. {advice}")


def plain(error: ImportError) -> ModelError | None:
    """The same for an import that failed inside a package that is there; None for any other."""
    module = error.name or ""
    top = module.partition(".")[0]
    package = LEANED_ON.get(top)
    if package is None or importlib.util.find_spec(top) is None:  # it is not there at all
        return None
    return changed(package, f"the module {module}", error)


def unloadable(error: ImportError) -> str | None:
    """Why MLX, which is installed, does not load here, and what to do; None for other imports.

    Its library is missing, or one that it needs: the driver's, on a machine without a card.
    """
    within = Path(error.path or "").parent.name == "mlx"
    gone = "import name" in str(error)  # a name that is gone is another fault
    if "libmlx" not in str(error) and (gone or not within):
        return None
    return f"MLX cannot be imported: {error}. {how_to_get_mlx()}."


def how_to_get_mlx() -> str:
    """For this machine and what is installed on it."""
    if sys.platform == "darwin":
        return f"{pip_install('mlx')}, with a Python for arm64 on macOS 14 or newer"
    if any(version(name) for name in BACKENDS if "cuda" in name):
        return (
            "MLX's CUDA build needs an NVIDIA card and its driver (does nvidia-smi answer?). "
            "Without one: a new environment with pip install 'mlx[cpu]'"
        )
    return (
        f"{pip_install('mlx[cpu]')}, or 'mlx[cuda13]' for an NVIDIA card with its driver; one of "
        "them in an environment, not both"
    )


def trouble(error: RuntimeError) -> Literal["memory", "time", "absent"] | None:
    """What of the device an error of MLX's is about; None where it is about something else."""
    text = str(error)
    if text.startswith(_NO_ROOM) or (text.startswith(_CUDA[0]) and text.endswith(_CUDA[1])):
        return "memory"
    if text.startswith(_TOO_LONG):
        return "time"
    return "absent" if text.startswith(_NO_METAL) else None


@contextmanager
def leaning_on(package: str, what: str) -> Iterator[None]:
    """Turn a name, an attribute or an argument that is gone into a ModelError that says so.

    For a few lines around what docs/upstream.md lists; the error that came stays its cause.
    """
    try:
        yield
    except ImportError as error:
        if plain(error) is None:
            raise
        raise changed(package, what, error) from error
    except (AttributeError, TypeError) as error:
        raise changed(package, what, error) from error


def _requirements() -> list[Requirement]:
    try:
        texts = importlib.metadata.requires(OURS) or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return []
    found = [Requirement(text) for text in texts]
    extras = set(importlib.metadata.metadata(OURS).get_all("Provides-Extra") or [])
    where = [{"extra": extra} for extra in sorted({"", *extras} - WORKSHOP)]
    return [r for r in found if r.marker is None or any(map(r.marker.evaluate, where))]


def version(package: str) -> str | None:
    """The installed one's."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
