"""The package as a stranger gets it: built, checked, installed without the clone, and run.

    python scripts/checks/package.py             build, twine check, install, imports, help
    python scripts/checks/package.py --demo      and the demo, in the installed environment
    python scripts/checks/package.py --installer uv      or pipx, which must be on the path

Needs a package index. Everything happens in a temporary folder; the checkout is not written to.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import time
start = time.perf_counter()
import fpo_mlx
seconds, loaded = time.perf_counter() - start, set(__import__("sys").modules)
assert "site-packages" in fpo_mlx.__file__, fpo_mlx.__file__
assert not {"mlx", "torch", "numpy"} & loaded, "import fpo_mlx loads too much"
assert seconds <= 0.3, f"import fpo_mlx took {seconds:.2f} s"
print(f"import fpo_mlx: {seconds * 1000:.0f} ms, of {fpo_mlx.__file__}")
"""


def call(*words: str | Path, cwd: Path, **environment: str) -> None:
    print("$", *words, flush=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    subprocess.run([str(word) for word in words], cwd=cwd, env=clean, check=True)


def copy_of_checkout(place: Path) -> Path:
    """What git knows of the checkout: building writes beside the sources."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def build(scratch: Path) -> Path:
    """Wheel and sdist, the wheel from the sdist, both looked at by twine -> the wheel."""
    call(sys.executable, "-m", "venv", "tools", cwd=scratch)
    python = scratch / "tools" / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", "build", "twine", cwd=scratch)
    source = copy_of_checkout(scratch / "source")
    call(python, "-m", "build", "--outdir", scratch / "dist", source, cwd=scratch)
    made = sorted((scratch / "dist").iterdir())
    call(python, "-m", "twine", "check", "--strict", *made, cwd=scratch)
    (wheel,) = (path for path in made if path.suffix == ".whl")
    return wheel


def install(wheel: Path, scratch: Path, installer: str) -> tuple[Path, Path]:
    """(the command, the Python) of an environment that has nothing but the wheel."""
    if installer == "pip":
        call(sys.executable, "-m", "venv", "env", cwd=scratch)
        bin = scratch / "env" / "bin"
        call(bin / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]", cwd=scratch)
        return bin / "fpo-mlx", bin / "python"
    if installer == "uv":
        places = {"UV_TOOL_DIR": str(scratch / "uv"), "UV_TOOL_BIN_DIR": str(scratch / "bin")}
        words = ("uv", "tool", "install", "--python", sys.executable, f"{wheel}[cpu]")
        call(*words, cwd=scratch, **places)
        return scratch / "bin" / "fpo-mlx", scratch / "uv" / "fpo-mlx" / "bin" / "python"
    places = {"PIPX_HOME": str(scratch / "pipx"), "PIPX_BIN_DIR": str(scratch / "bin")}
    call("pipx", "install", "--python", sys.executable, f"{wheel}[cpu]", cwd=scratch, **places)
    python = scratch / "pipx" / "venvs" / "fpo-mlx" / "bin" / "python"
    return scratch / "bin" / "fpo-mlx", python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="run it, downloads its model")
    parser.add_argument("--installer", choices=("pip", "uv", "pipx"), default="pip")
    parser.add_argument("--wheel", type=Path, help="a wheel that is there: nothing is built")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel = args.wheel.resolve() if args.wheel else build(scratch)
        command, python = install(wheel, scratch, args.installer)
        call(python, "-c", PROBE, cwd=scratch)
        call(command, "--version", cwd=scratch)
        call(command, "train", "--help", cwd=scratch)
        if args.demo:
            call(command, "demo", "--output", scratch / "fpo-demo", cwd=scratch)
    print("the package is whole")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"package.py: {error}")
