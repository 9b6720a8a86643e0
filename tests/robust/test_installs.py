"""torch without mlx precomputes; mlx without torch does everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from command_line import ROWS, lines, random_sae, usual
from launchers import ROOT, environment

from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")
pytest.importorskip("torch")

WITHOUT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # an import of it fails, and it counts as not installed
from fpo_mlx.cli import main
main(sys.argv[1:])
"""


def run_without(blocked: tuple[str, ...], *words: object) -> subprocess.CompletedProcess:
    code = WITHOUT.format(blocked=blocked)
    return subprocess.run(
        [sys.executable, "-c", code, *(str(word) for word in words)],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Inputs, and the cache that a machine with torch and without mlx made of them."""
    root = tmp_path_factory.mktemp("installs")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    lines(root / "data" / "train.jsonl", *ROWS)
    words = [*usual(root), "--backend", "torch", "--output", root / "ref"]
    done = run_without(("mlx", "mlx_lm"), "precompute", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(ROWS)} pairs, {2 * len(ROWS)} rows in")
    return root


def train_words(place: Path, out: Path) -> list[object]:
    flags = ["--top-k", 5, "--iters", 2, "--batch-size", 1, "--reference", place / "ref"]
    return ["train", *usual(place), *flags, "--adapter-path", out]


def test_mlx_without_torch_trains_from_the_cache_that_torch_without_mlx_made(place, tmp_path):
    done = run_without(("torch",), *train_words(place, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stderr
    assert (tmp_path / "out" / "adapters.safetensors").is_file()


@pytest.mark.parametrize("missing", [("mlx", "mlx_lm"), ("torch",)])
def test_what_a_machine_lacks_is_a_plain_error_that_says_what_works(place, tmp_path, missing):
    words = train_words(place, tmp_path / "out")
    if missing == ("torch",):
        words = ["precompute", *usual(place), "--backend", "torch", "--output", tmp_path / "out"]
    done = run_without(missing, *words)
    assert done.returncode == (2 if missing == ("torch",) else 1), done.stderr
    assert "Traceback" not in done.stderr
    assert f"the package {missing[0].split('_')[0]}" in done.stderr
    assert "backend" in done.stderr
    assert not (tmp_path / "out").exists()
