"""Which versions an environment gets: locked with hashes, newest of all, or lowest of all.

    python scripts/make/lock.py [lock]            write requirements.lock beside this file
    python scripts/make/lock.py newest -o FILE    the newest that the index serves, bounds ignored
    python scripts/make/lock.py lowest -o FILE    the lowest that pyproject.toml allows

Needs uv (`make lock` has its own) and a package index: PyPI, or what --index says.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = Path(__file__).resolve().parent / "requirements.lock"
PYPI = "https://pypi.org/simple"
OLDEST_PYTHON = "3.11"
BUILD = ("setuptools>=77",)  # of the editable install, which is built in the same environment
# What torch brings that is alike on all machines; torch itself is not, see the Makefile.
OF_TORCH = ("networkx>=3", "sympy>=1.13")
KINDS = ("lock", "newest", "lowest")
UPPER = re.compile(r",\s*<[^,;]+")
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==\S+.*?(?=^[A-Za-z0-9]|\Z)", re.MULTILINE | re.DOTALL)


def versions(text: str) -> dict[str, list[str]]:
    """Name -> its versions (several where a marker tells them apart), of a requirements file."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE):
        found.setdefault(name, []).append(version)
    return found


def entries_of(text: str) -> dict[str, list[str]]:
    """Name -> its entries as they stand, markers and hashes with them."""
    found: dict[str, list[str]] = {}
    for match in ENTRY.finditer(text):
        found.setdefault(match[1], []).append(" ".join(match[0].split()))
    return found


def changes(old: str, new: str) -> list[str]:
    """One line per package whose versions, hashes or markers are others in `new`."""
    before, after = versions(old), versions(new)
    was, now = entries_of(old), entries_of(new)
    lines = []
    for name in sorted(before | after):
        a, b = before.get(name, []), after.get(name, [])
        if sorted(a) != sorted(b):
            lines.append(f"{name} {', '.join(a) or '(new)'} -> {', '.join(b) or '(gone)'}")
        elif sorted(was[name]) != sorted(now[name]):
            lines.append(f"{name} {', '.join(b)}: other hashes or markers")
    return lines


def unbounded(pyproject: str) -> list[str]:
    """The requirements of a CPU that have an upper bound, without it: uv lets them override."""
    project = tomllib.loads(pyproject)["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    return [UPPER.sub("", text) for text in texts if UPPER.search(text)]


def compile_with(uv: str, kind: str, index: str, output: Path, beside: Path) -> None:
    """Ask uv. Nothing of this machine's settings goes in: no configuration, no other index."""
    words = [
        uv, "pip", "compile", "pyproject.toml", str(beside), "--output-file", str(output),
        "--no-config", "--default-index", index, "--no-annotate", "--upgrade",
        "--extra", "dev", "--extra", "cpu",
        "--custom-compile-command", f"make {kind if kind == 'lock' else 'test-' + kind}",
    ]  # fmt: skip
    if kind == "lock":
        words += ["--universal", "--generate-hashes", "--python-version", OLDEST_PYTHON]
    else:  # for the Python that runs this, of what is built for it
        words += ["--python", sys.executable, "--only-binary", ":all:"]
    if kind == "lowest":
        words += ["--resolution", "lowest-direct"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
    environment["UV_PYTHON_DOWNLOADS"] = "never"
    if kind == "newest":
        overrides = beside.with_name("overrides.txt")
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        overrides.write_text("\n".join(unbounded(text)) + "\n", encoding="utf-8")
        words += ["--override", str(overrides)]
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"uv could not resolve the {kind} versions (see above); {output} is as it was")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS, default="lock")
    parser.add_argument("-o", "--output", type=Path, help=f"default, of a lock: {LOCK.name}")
    parser.add_argument("--index", default=PYPI, help="default: %(default)s")
    parser.add_argument("--uv", default="uv")
    args = parser.parse_args()
    output = (args.output or LOCK).resolve()
    if args.output is None and args.kind != "lock":
        parser.error(f"{args.kind} needs --output: the lock is not to be written over")
    old = output.read_text(encoding="utf-8") if output.exists() else ""
    with tempfile.TemporaryDirectory() as folder:
        beside, new = Path(folder) / "beside.txt", Path(folder) / "new.txt"
        names = BUILD + OF_TORCH if args.kind == "lock" else BUILD
        beside.write_text("\n".join(names) + "\n", encoding="utf-8")
        compile_with(args.uv, args.kind, args.index, new, beside)
        text = new.read_text(encoding="utf-8")
    lines = changes(old, text)
    if text != old:  # else `make` would install it all again
        part = output.with_name(output.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(output)
    print("\n".join(lines) if lines else "nothing changed")
    print(f"{output.name}: {len(versions(text))} packages, {len(lines)} changed")


if __name__ == "__main__":
    main()
