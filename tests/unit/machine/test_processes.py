"""Real launchers: several processes do the work of one. Tiny model, this machine only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_models
from command_line import ROWS, lines, random_sae, run
from launchers import launch, mlx_launch

from fpo_mlx import cache
from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")
pytest.importorskip("torch")

PAIRS = 70  # two shards: work for two


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, an SAE and enough pairs for two shards."""
    root = tmp_path_factory.mktemp("many")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    rows = [{**ROWS[n % 4], "prompt": f"{'Question ' * (n % 5)}{n}?"} for n in range(PAIRS)]
    lines(root / "data" / "train.jsonl", *rows)
    return root


def precompute(place: Path, out: Path, backend: str) -> list[object]:
    return [
        "precompute", "--model", place / "model", "--sae", place / "sae",
        "--data", place / "data", "--backend", backend, "--output", out,
    ]  # fmt: skip


def same_keyed_content(a: Path, b: Path) -> None:
    one, two = (cache.open_cache(path, cache.read_identity(path)) for path in (a, b))
    assert one.keys() == two.keys()  # in the same order, too
    assert len(one) == 2 * PAIRS
    for key in one.keys():  # noqa: SIM118 (a list)
        differences = cache.compare_scores(one.get(key), two.get(key))
        assert max(differences) < 1e-6


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_two_launched_processes_precompute_the_cache_of_one(place, tmp_path, backend):
    alone = run(*precompute(place, tmp_path / "one", backend))
    assert alone.exit_code == 0, alone.stderr
    words = precompute(place, tmp_path / "two", backend)
    if backend == "mlx":
        both = launch(mlx_launch(2, *words))
    else:
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        both = launch([*runner, "--nproc-per-node", 2, "-m", "fpo_mlx", *words], torch=True)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count(f"{PAIRS} pairs, {2 * PAIRS} rows in") == 1, both.stdout  # one speaks
    same_keyed_content(tmp_path / "one", tmp_path / "two")
    shards = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two")]
    assert shards[0] == shards[1]
    assert len(shards[0]) == 3  # the manifest and two shards
