"""Does every supported platform find wheels for the lock? Asks the index, installs nothing.

    python scripts/checks/lock_platforms.py [--only macos-arm64] [--python 3.13]

pip reads a requirement's markers for the machine that it runs on; this evaluates them for the other
platform first, and then has pip download exactly those versions, by their hashes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path(__file__).resolve().parent.parent / "make" / "requirements.lock"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
GLIBC = ("manylinux_2_35", "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014")
# Name -> (system, machine, the tags of the wheels that such a machine takes).
PLATFORMS = {
    "macos-arm64": ("Darwin", "arm64", ("macosx_14_0_arm64",)),
    "linux-x86_64": ("Linux", "x86_64", tuple(f"{tag}_x86_64" for tag in GLIBC)),
    "linux-aarch64": ("Linux", "aarch64", tuple(f"{tag}_aarch64" for tag in GLIBC)),
}


def entries(text: str) -> list[tuple[Requirement, list[str]]]:
    """(requirement, its hashes) of each entry of a lock."""
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        if line and not line.startswith("#"):
            head = re.split(r"\s+--hash=", line)
            found.append((Requirement(head[0]), [h.strip() for h in head[1:]]))
    return found


def environment(platform: str, python: str) -> dict[str, str]:
    """What a marker may ask of such a machine."""
    system, machine, _ = PLATFORMS[platform]
    return {
        "platform_system": system,
        "sys_platform": system.lower(),
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.1",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "extra": "",
    }


def chosen(text: str, platform: str, python: str) -> list[tuple[Requirement, list[str]]]:
    """The entries that such a machine installs."""
    where = environment(platform, python)
    return [
        (requirement, hashes)
        for requirement, hashes in entries(text)
        if requirement.marker is None or requirement.marker.evaluate(where)
    ]


def download(platform: str, python: str, folder: Path) -> int:
    """Wheels that pip found for all of them. Ends the script where one is missing."""
    wanted = chosen(LOCK.read_text(encoding="utf-8"), platform, python)
    lines = [
        f"{requirement.name}{requirement.specifier} " + " ".join(f"--hash={h}" for h in hashes)
        for requirement, hashes in wanted
    ]
    mirror = folder / "mirror.txt"
    mirror.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    words += ["--only-binary=:all:", "--python-version", python, "--dest", str(folder / "wheels")]
    for tag in PLATFORMS[platform][2]:
        words += ["--platform", tag]
    done = subprocess.run([*words, "-r", str(mirror)])
    if done.returncode:
        sys.exit(f"{platform}, Python {python}: not all of the lock is there (see above)")
    return len(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PLATFORMS), help="default: all platforms")
    parser.add_argument("--python", choices=PYTHONS, help="default: all versions")
    args = parser.parse_args()
    for platform in [args.only] if args.only else PLATFORMS:
        for python in [args.python] if args.python else PYTHONS:
            with tempfile.TemporaryDirectory() as folder:
                count = download(platform, python, Path(folder))
            print(f"{platform}, Python {python}: {count} wheels", flush=True)


if __name__ == "__main__":
    main()
