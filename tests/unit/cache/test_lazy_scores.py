"""References are read when a batch needs them: what training holds does not grow with features."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cached import IDENTITY, fake_score, filled, make_pairs

from fpo_mlx import cache as rc
from fpo_mlx.errors import CacheMismatch, FpoError
from fpo_mlx.pipeline import CachedScores
from fpo_mlx.storage.tensors import OpenFiles
from fpo_mlx.train.metrics import ScoredPairs

BENCH = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "data_side.py"


def same(a, b) -> bool:
    return (a.logps, a.tokens) == (b.logps, b.tokens) and all(
        x.indices.tolist() == y.indices.tolist() and x.values.tolist() == y.values.tolist()
        for x, y in zip(a.features, b.features, strict=True)
    )


def test_scores_in_any_order_are_those_of_their_pairs(tmp_path):
    pairs = make_pairs(20)
    filled(tmp_path, pairs, shard_pairs=3)
    data = ScoredPairs(pairs, CachedScores(rc.open_cache(tmp_path, IDENTITY), pairs))
    some = data.take([7, 0, 19, 7])
    assert [pair.index for pair in some.pairs] == [7, 0, 19, 7]
    for pair, ref in zip(some.pairs, some.refs, strict=True):
        for response, side in zip(pair.responses, ref, strict=True):
            assert same(side, fake_score(pair.prompt, response))
    assert len(data.refs) == len(list(data.refs)) == 20
    assert [ref[0].logps for ref in data.refs[3:5]] == [data.refs[i][0].logps for i in (3, 4)]


def test_a_row_that_is_missing_is_said_before_the_first_batch(tmp_path):
    pairs = make_pairs(4)
    filled(tmp_path, pairs[:3])
    with pytest.raises(CacheMismatch, match="no row for .* precompute"):
        CachedScores(rc.open_cache(tmp_path, IDENTITY), pairs)


def test_only_the_rows_of_the_pairs_that_are_read_have_to_be_there(tmp_path):
    pairs = make_pairs(4)
    store = filled(tmp_path, [pairs[2], pairs[0]])
    refs = CachedScores(store, pairs, [0, 2])
    assert len(refs) == 4
    assert same(refs[2][1], fake_score(pairs[2].prompt, pairs[2].rejected))
    with pytest.raises(CacheMismatch, match="no row for"):
        refs[1]
    with pytest.raises(CacheMismatch, match="no row for"):
        CachedScores(store, pairs, [0, 3])


def test_a_shard_that_was_cut_after_opening_is_named(tmp_path):
    pairs = make_pairs(4)
    filled(tmp_path, pairs)
    store = rc.open_cache(tmp_path, IDENTITY)
    refs = CachedScores(store, pairs)
    same(refs[0][0], refs[0][0])  # its content is checked
    path = tmp_path / "rows-00000.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(FpoError, match=r"rows-00000\.safetensors is damaged: it ends at byte"):
        [refs[i] for i in range(4)]


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="no list of open files here")
def test_only_a_few_of_many_files_are_open_at_once(tmp_path):
    paths = [tmp_path / str(i) for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes(range(i, i + 50)))
    before = len(os.listdir("/dev/fd"))
    files = OpenFiles(most=3)
    for turn in range(3):
        for i, path in enumerate(paths):
            assert files.read(path, turn, 2) == bytes([i + turn, i + turn + 1])
    assert len(os.listdir("/dev/fd")) == before + 3
    files.close()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.slow
def test_an_epoch_over_a_cache_of_a_hundred_megabytes_holds_a_few_of_them():
    command = [sys.executable, str(BENCH), "--pairs", "1000", "--features", "6000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["MB peak"] - found["MB before"] < 15  # 96 MB of features are read
