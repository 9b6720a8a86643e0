"""Two fresh virtual environments: torch without mlx precomputes, mlx without torch trains from it.

    python scripts/checks/installs.py [--work FOLDER] [--torch-index URL]

Needs pip and a package index, and for the inputs a Python that has torch and the tests' packages.
On Linux without a GPU give --torch-index https://download.pytorch.org/whl/cpu for a small torch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INPUTS = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/support")
import tiny_models
from command_line import ROWS, lines, random_sae
from fpo_mlx.sae.convert import write_saelens
root = Path(sys.argv[1])
tiny_models.tiny_llama(root / "model", tokenizer=True)
write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
lines(root / "data" / "train.jsonl", *ROWS)
"""


def dependencies() -> list[str]:
    """The package's requirements, as pyproject.toml has them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r'"([^"]+)"', block)


def run(*words: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def make(folder: Path, packages: list[str], *first: str) -> Path:
    """A virtual environment with these packages and fpo-mlx itself; its Python.

    first: what pip is to install before them, with its options.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if first:
        run(python, "-m", "pip", "install", "-q", *first)
    run(python, "-m", "pip", "install", "-q", *packages)
    run(python, "-m", "pip", "install", "-q", "--no-deps", ROOT)
    return python


def has(python: Path, name: str) -> bool:
    code = f"import importlib.util as u; print(u.find_spec({name!r}) is not None)"
    return run(python, "-c", code).strip() == "True"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--torch-index", help="package index to take torch from")
    parser.add_argument("--torch", default="torch", help="requirement, as pip takes it")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fpo-mlx-installs-"))
    work.mkdir(parents=True, exist_ok=True)
    inputs = work / "inputs"
    run(sys.executable, "-c", INPUTS, inputs, cwd=ROOT)
    common = ["--model", inputs / "model", "--sae", inputs / "sae", "--data", inputs / "data"]
    needed = dependencies()
    plain = [name for name in needed if not name.startswith("mlx")]
    index = ("--index-url", args.torch_index) if args.torch_index else ()
    torch_python = make(work / "torch", plain, *index, args.torch)
    print(f"torch's: torch {has(torch_python, 'torch')}, mlx {has(torch_python, 'mlx')}")
    fpo = [torch_python, "-m", "fpo_mlx"]
    words = [*common, "--backend", "torch", "--output", work / "ref"]
    print("precompute:", run(*fpo, "precompute", *words, cwd=work).strip())
    mlx_python = make(work / "mlx", needed)
    print(f"mlx's: torch {has(mlx_python, 'torch')}, mlx {has(mlx_python, 'mlx')}")
    fpo = [mlx_python, "-m", "fpo_mlx"]
    flags = ["--top-k", 5, "--iters", 2, "--batch-size", 1, "--reference", work / "ref"]
    out = ["--adapter-path", work / "out"]
    print("train:", run(*fpo, "train", *common, *flags, *out, cwd=work).strip())
    run(*fpo, "evaluate", *common, *flags[:2], *flags[-2:], *out, "--split", "train",
        "--json", work / "scores.json", cwd=work)  # fmt: skip
    print("evaluate:", json.loads((work / "scores.json").read_text())["summary"]["n"], "pairs")
    words = ["--model", inputs / "model", *out, "--save-path", work / "fused"]
    print("fuse:", run(*fpo, "fuse", *words, cwd=work).strip())
    print("cache verify:", run(*fpo, "cache", "verify", work / "ref", *common, cwd=work).strip())


if __name__ == "__main__":
    main()
