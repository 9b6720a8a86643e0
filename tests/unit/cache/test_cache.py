"""The reference cache: its bytes, its refusals, and that no kill can hurt it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from cached import (  # noqa: E402, F401
    IDENTITY,
    Scorer,
    fake_score,
    filled,
    folder_bytes,
    make_pair,
    make_pairs,
    shared_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_mlx import cache as rc
from fpo_mlx.errors import CacheMismatch, DataError, FpoError
from fpo_mlx.records import ResponseScore, SparseFeatures


def assert_same_score(a: ResponseScore, b: ResponseScore) -> None:
    assert (a.logps, a.tokens) == (b.logps, b.tokens)
    for x, y in zip(a.features, b.features, strict=True):
        np.testing.assert_array_equal(x.indices, y.indices)
        np.testing.assert_array_equal(x.values, y.values)


def golden_rows():
    features = SparseFeatures(np.array([1, 5], np.int32), np.array([0.5, 2.0], np.float32))
    nothing = SparseFeatures(np.array([], np.int32), np.array([], np.float32))
    return [
        (bytes(range(16)), ResponseScore(-1.5, 3, (features,))),
        (bytes(range(16, 32)), ResponseScore(-2.0, 1, (nothing,))),
    ]


def test_the_bytes_of_a_shard_are_those_of_the_written_format(tmp_path):
    rc.open_cache(tmp_path / "c", IDENTITY, create=True).append(golden_rows())
    data = (tmp_path / "c" / "rows-00000.safetensors").read_bytes()
    body = {
        "logps": np.array([-1.5, -2.0], "<f8"),
        "features.0.offsets": np.array([0, 2, 2], "<i8"),
        "features.0.indices": np.array([1, 5], "<i4"),
        "tokens": np.array([3, 1], "<i4"),
        "features.0.values": np.array([0.5, 2.0], "<f4"),
        "keys": np.arange(32, dtype=np.uint8),
    }
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    about = json.loads(header.pop("__metadata__")["fpo_mlx"])
    assert about == {
        "format": "fpo-mlx.reference",
        "version": 1,
        "identity": IDENTITY.digest(),
        "backend": "mlx",
        "dtype": "float32",
        "rows": 2,
        "sha256": hashlib.sha256(data[8 + header_size :]).hexdigest(),
    }
    for name, entry in header.items():
        begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
        assert data[begin:end] == body[name].tobytes()
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "keys": ("U8", [2, 16]),
        "logps": ("F64", [2]),
        "tokens": ("I32", [2]),
        "features.0.offsets": ("I64", [3]),
        "features.0.indices": ("I32", [2]),
        "features.0.values": ("F32", [2]),
    }
    # the whole file, as version 1 of the format has it: whoever changes it raises the version
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHARD


GOLDEN_SHARD = "91739d295ac2bf7bb1c2c362d064da7eccaf3b87836b1cdf55c618a230b89b96"


def test_a_shard_is_readable_with_safetensors_alone(tmp_path):
    rc.open_cache(tmp_path / "c", IDENTITY, create=True).append(golden_rows())
    arrays = safetensors.numpy.load_file(tmp_path / "c" / "rows-00000.safetensors")
    np.testing.assert_array_equal(arrays["logps"], [-1.5, -2.0])
    np.testing.assert_array_equal(arrays["tokens"], [3, 1])
    np.testing.assert_array_equal(arrays["keys"].tobytes(), bytes(range(32)))
    np.testing.assert_array_equal(arrays["features.0.offsets"], [0, 2, 2])
    np.testing.assert_array_equal(arrays["features.0.indices"], [1, 5])
    np.testing.assert_array_equal(arrays["features.0.values"], [0.5, 2.0])


def test_the_manifest_and_the_digest_are_as_documented(tmp_path):
    rc.open_cache(tmp_path / "c", IDENTITY, create=True).append(golden_rows())
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    deciding = (
        f'["fpo-mlx.reference",1,{{"adapter":"none","model":"{"m" * 64}","pooled_keep":null,'
        f'"saes":[["{"s" * 64}","resid_post of block 1"]],"tokenizer":"{"t" * 64}"}}]'
    )
    assert manifest == {
        "format": "fpo-mlx.reference",
        "version": 1,
        "digest": hashlib.sha256(deciding.encode()).hexdigest(),
        "identity": {
            "model": "m" * 64,
            "tokenizer": "t" * 64,
            "adapter": "none",
            "saes": [["s" * 64, "resid_post of block 1"]],
            "pooled_keep": None,
            "dtype": "float32",
            "backend": "mlx",
        },
    }


def test_what_was_written_is_read_back_by_another_cache_object(tmp_path):
    pairs = make_pairs(10)
    filled(tmp_path, pairs, shard_pairs=3)
    again = rc.open_cache(tmp_path, IDENTITY)
    for pair in pairs:
        for key, response in zip(pair.keys, pair.responses, strict=True):
            assert_same_score(again.get(key), fake_score(pair.prompt, response))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"rows-0000{i}.safetensors" for i in range(4)),
    ]


def test_a_row_without_any_feature_is_read_back_empty(tmp_path):
    cache = rc.open_cache(tmp_path, IDENTITY, create=True)
    cache.append(golden_rows())
    assert cache.get(bytes(range(16, 32))).features[0].to_dense(8).tolist() == [0.0] * 8
    cache.append([(b"x" * 16, golden_rows()[1][1])])  # a shard with no feature at all
    assert len(rc.open_cache(tmp_path, IDENTITY).get(b"x" * 16).features[0].indices) == 0


@settings(max_examples=40)
@given(order=st.permutations(range(9)), first=st.integers(0, 9), shard=st.integers(1, 5))
def test_the_order_of_the_rows_and_a_subset_done_before_change_no_value(
    tmp_path_factory, order, first, shard
):
    folder, pairs = tmp_path_factory.mktemp("cache"), make_pairs(9)
    filled(folder, pairs[:first], shard_pairs=shard)
    cache, scorer = rc.open_cache(folder, IDENTITY, create=True), Scorer()
    report = rc.fill(cache, [pairs[i] for i in order], scorer, shard_pairs=shard)
    asked = {key for group in scorer.groups for pair in group for key in pair.keys}
    assert asked == {key for pair in pairs[first:] for key in pair.keys}  # only the missing
    assert (report.pairs, report.rows) == (9 - first, len(asked))
    assert len(cache) == 18
    for pair in pairs:
        assert_same_score(cache.get(pair.keys[1]), fake_score(pair.prompt, pair.rejected))


@given(order=st.permutations(range(7)))
@settings(max_examples=20)
def test_the_order_of_the_rows_does_not_change_a_byte(tmp_path_factory, order):
    folder, pairs = tmp_path_factory.mktemp("cache"), make_pairs(7)
    filled(folder / "a", pairs, shard_pairs=2)
    filled(folder / "b", [pairs[i] for i in order], shard_pairs=2)
    assert folder_bytes(folder / "a") == folder_bytes(folder / "b")


def test_a_row_that_pairs_share_is_stored_and_planned_once(tmp_path):
    scorer = Scorer()
    cache = rc.open_cache(tmp_path, IDENTITY, create=True)
    rc.fill(cache, shared_rows(), scorer, shard_pairs=2)
    assert len(cache) == 6
    assert sum(len(shard.keys) for shard in cache.shards) == 6
    assert sum(map(len, scorer.groups)) <= 5  # (b, a) and one more bring nothing new


@pytest.mark.parametrize("pairs", [make_pairs(11), shared_rows()], ids=["plain", "shared rows"])
def test_a_run_killed_at_any_shard_and_resumed_gives_the_same_bytes(tmp_path, pairs):
    filled(tmp_path / "whole", pairs, shard_pairs=2)
    groups = len(list((tmp_path / "whole").glob("rows-*")))
    assert groups >= 3
    for kill in range(groups):
        folder = tmp_path / f"killed-{kill}"
        with pytest.raises(KeyboardInterrupt):
            rc.fill(
                rc.open_cache(folder, IDENTITY, create=True), pairs, Scorer(kill), shard_pairs=2
            )
        assert len(list(folder.glob("rows-*"))) == kill
        filled(folder, pairs, shard_pairs=2)
        assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("call", range(12))
def test_a_run_killed_at_any_file_operation_and_resumed_gives_the_same_bytes(
    tmp_path, monkeypatch, call
):
    pairs = make_pairs(5)
    filled(tmp_path / "whole", pairs, shard_pairs=2)
    real, left = {"fsync": os.fsync, "replace": os.replace}, [call]

    def dying(name):
        def operation(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real[name](*args)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying("fsync"))
        patch.setattr(os, "replace", dying("replace"))
        with pytest.raises(KeyboardInterrupt):  # 12 operations: a manifest and three shards
            filled(tmp_path / "killed", pairs, shard_pairs=2)
    # opening for reading sees whole shards only, or no cache yet
    if (tmp_path / "killed" / "manifest.json").exists():
        assert len(rc.open_cache(tmp_path / "killed", IDENTITY)) in (0, 4, 8, 10)
    filled(tmp_path / "killed", pairs, shard_pairs=2)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_opening_for_writing_leaves_nothing_until_the_first_row(tmp_path):
    rc.open_cache(tmp_path / "c", IDENTITY, create=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"model": "n" * 64}, "m" * 64, "n" * 64),
        ({"adapter": "a" * 64}, "none", "a" * 64),
        ({"tokenizer": "u" * 64}, "t" * 64, "u" * 64),
        ({"saes": (("s" * 64, "mlp_out of block 1"),)}, "resid_post", "mlp_out"),
        ({"saes": (("z" * 64, "resid_post of block 1"),)}, "s" * 64, "z" * 64),
        ({"pooled_keep": 7}, "all", "largest 7"),
    ],
    ids=["model", "adapter", "tokenizer", "site", "sae", "pooled_keep"],
)
def test_a_foreign_cache_is_refused_with_both_fingerprints(tmp_path, change, old, new):
    filled(tmp_path, make_pairs(2))
    for create in (False, True):
        with pytest.raises(CacheMismatch) as caught:
            rc.open_cache(tmp_path, replace(IDENTITY, **change), create=create)
        text = str(caught.value)
        assert f"  {next(iter(change))}: cache " in text
        assert old in text
        assert new in text
        assert str(tmp_path) in text


def test_another_backend_or_dtype_may_read_and_add_and_is_recorded(tmp_path):
    pairs = make_pairs(4)
    filled(tmp_path, pairs[:1])
    filled(tmp_path, pairs, made=rc.Provenance("bfloat16", "torch"))
    assert rc.info(tmp_path).backends == (("mlx", "float32", 2), ("torch", "bfloat16", 6))
    assert rc.info(tmp_path).made == rc.Provenance("float32", "mlx")  # the first rows'


def test_a_difference_that_is_allowed_makes_the_cache_read_only(tmp_path):
    pairs = make_pairs(2)
    filled(tmp_path, pairs)
    other = replace(IDENTITY, model="n" * 64)
    cache = rc.open_cache(tmp_path, other, allow=("model",))
    assert cache.differences == {"model": ("m" * 64, "n" * 64)}
    assert_same_score(cache.get(pairs[0].keys[0]), fake_score(pairs[0].prompt, pairs[0].chosen))
    with pytest.raises(CacheMismatch, match="read here and not extended"):
        cache.append(golden_rows())


def two_saes(logps: float) -> ResponseScore:
    pooled = [SparseFeatures(np.array([i], np.int32), np.array([1.0], np.float32)) for i in (3, 7)]
    return ResponseScore(logps, 2, tuple(pooled))


def test_a_run_with_fewer_saes_reads_its_own_features(tmp_path):
    both = (("a" * 64, "resid_post of block 1"), ("b" * 64, "resid_post of block 2"))
    rc.open_cache(tmp_path, replace(IDENTITY, saes=both), create=True).append(
        [(b"k" * 16, two_saes(-1.0))]
    )
    for saes, wanted in [(both[1:], [7]), (both[::-1], [7, 3]), ((), [])]:
        cache = rc.open_cache(tmp_path, replace(IDENTITY, saes=saes))
        got = [int(f.indices[0]) for f in cache.get(b"k" * 16).features]
        assert got == wanted
        with pytest.raises(CacheMismatch, match="list of SAEs"):
            cache.append([(b"l" * 16, two_saes(-1.0))])


def test_a_missing_row_is_named_with_the_command_that_adds_it(tmp_path):
    cache = filled(tmp_path, make_pairs(2))
    with pytest.raises(CacheMismatch, match=r"no row for 6b6b.* among its 4.*precompute"):
        cache.get(b"k" * 16)
    keys = [b"k" * 16, make_pairs(2)[0].keys[0], b"k" * 16]
    assert cache.missing(keys) == [b"k" * 16]


@pytest.mark.parametrize(
    ("logps", "value", "message"),
    [
        (float("nan"), 1.0, r"log-prob is nan"),
        (float("-inf"), 1.0, r"log-prob is -inf"),
        (-1.0, float("nan"), r"SAE 0: pooled feature 4 is not a finite"),
        (-1.0, float("inf"), r"SAE 0: pooled feature 4 is not a finite"),
        (-1.0, 1e39, r"SAE 0: pooled feature 4 is not a finite"),
    ],
)
def test_a_value_that_is_not_finite_is_refused_with_its_place(tmp_path, logps, value, message):
    pair = make_pairs(1)[0]
    features = SparseFeatures(np.array([2, 4]), np.array([1.0, value], np.float64))

    def score(pairs):
        bad = ResponseScore(logps, len(pair.rejected), (features,))
        return [(fake_score(pair.prompt, pair.chosen), bad)]

    cache = rc.open_cache(tmp_path, IDENTITY, create=True)
    with pytest.raises(FpoError, match=r"train.jsonl:1, rejected.*" + message):
        rc.fill(cache, [pair], score)
    assert len(rc.open_cache(tmp_path, IDENTITY)) == 0


def test_a_backend_that_miscounts_is_caught(tmp_path):
    pair = make_pair(0, [1], [2, 3], [4])
    cache = rc.open_cache(tmp_path, IDENTITY, create=True)
    wrong = fake_score(pair.prompt, pair.chosen)
    with pytest.raises(FpoError, match="scored 2 tokens of a response of 1"):
        rc.fill(cache, [pair], lambda pairs: [(wrong, wrong)])
    with pytest.raises(FpoError, match="0 scores for 1 pairs"):
        rc.fill(cache, [pair], lambda pairs: [])


def last_shard(folder: Path) -> Path:
    return max(folder.glob("rows-*"))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard_is_reported_with_its_path(tmp_path, keep):
    filled(tmp_path, make_pairs(4), shard_pairs=2)
    shard = last_shard(tmp_path)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(FpoError, match=r"rows-00001\.safetensors is damaged.*Delete this file"):
        rc.open_cache(tmp_path, IDENTITY)


def test_a_shard_with_a_flipped_bit_is_reported_when_it_is_read(tmp_path):
    pairs = make_pairs(2)
    filled(tmp_path, pairs)
    data = bytearray(last_shard(tmp_path).read_bytes())
    data[-200] ^= 1  # within a value: the structure stays right
    last_shard(tmp_path).write_bytes(data)
    cache = rc.open_cache(tmp_path, IDENTITY)
    with pytest.raises(FpoError, match=r"rows-00000\.safetensors is damaged.*sha256"):
        cache.get(cache.keys()[0])


def test_a_deleted_shard_costs_its_rows_and_no_more(tmp_path):
    pairs = make_pairs(6)
    filled(tmp_path, pairs, shard_pairs=2)
    (tmp_path / "rows-00001.safetensors").unlink()
    cache, scorer = rc.open_cache(tmp_path, IDENTITY), Scorer()
    rc.fill(cache, pairs, scorer)
    assert sum(map(len, scorer.groups)) == 2
    assert len(rc.open_cache(tmp_path, IDENTITY)) == 12


def test_a_shard_of_another_cache_in_the_folder_is_refused(tmp_path):
    filled(tmp_path / "a", make_pairs(2))
    filled(tmp_path / "b", make_pairs(2), identity=replace(IDENTITY, model="n" * 64))
    shutil.copy(last_shard(tmp_path / "b"), tmp_path / "a" / "rows-00007.safetensors")
    with pytest.raises(CacheMismatch, match=r"rows-00007.*belongs to another cache"):
        rc.open_cache(tmp_path / "a", IDENTITY)


def test_folders_that_are_no_cache_are_refused(tmp_path):
    with pytest.raises(CacheMismatch, match="no reference cache"):
        rc.open_cache(tmp_path / "nothing", IDENTITY)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CacheMismatch, match=r"holds other files \(thesis.tex\)"):
        rc.open_cache(tmp_path, IDENTITY, create=True)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CacheMismatch, match=r"manifest\.json cannot be read"):
        rc.open_cache(tmp_path, IDENTITY)
    (tmp_path / "manifest.json").write_text('{"format": "fpo-mlx.reference", "version": 9}')
    with pytest.raises(CacheMismatch, match="version 9; this program reads"):
        rc.open_cache(tmp_path, IDENTITY)


def test_two_writers_are_kept_apart_and_the_first_is_named(tmp_path):
    first = rc.open_cache(tmp_path, IDENTITY, create=True)
    second = rc.open_cache(tmp_path, IDENTITY, create=True)
    with first.writing():
        with pytest.raises(FpoError, match=rf"being written by pid {os.getpid()} on "):
            second.append(golden_rows())
        first.append(golden_rows())
    assert second.append(golden_rows()) == 0  # it sees what the first wrote meanwhile
    assert not (tmp_path / "writer.lock").exists()


def hold_and_die(folder: Path) -> None:
    with rc.open_cache(folder, IDENTITY, create=True).writing():
        (folder / ".tmp-1-rows-00000.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), 9)


def test_a_killed_writer_blocks_nobody_and_its_half_file_goes(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert (tmp_path / "writer.lock").exists()
    assert (tmp_path / ".tmp-1-rows-00000.safetensors").exists()
    assert len(rc.open_cache(tmp_path, IDENTITY)) == 0  # a reader minds neither
    filled(tmp_path, make_pairs(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "rows-00000.safetensors"]


def test_a_writer_killed_at_its_very_end_leaves_nothing_once_it_is_looked_at(tmp_path):
    filled(tmp_path, make_pairs(2))
    cache = rc.open_cache(tmp_path, IDENTITY)
    with rc.open_cache(tmp_path, IDENTITY, create=True).writing():
        (tmp_path / ".tmp-2-rows").write_text("of the living one")
        cache.tidy()
        assert (tmp_path / ".tmp-2-rows").exists()
    (tmp_path / "writer.lock").write_text("pid 1 on nowhere")
    cache.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "rows-00000.safetensors"]


def test_keeping_the_largest_features_says_what_that_dropped(tmp_path):
    values = np.array([1.0, -4.0, 2.0, 3.0], np.float32)
    score = ResponseScore(-1.0, 1, (SparseFeatures(np.array([0, 2, 5, 9], np.int32), values),))
    cache = rc.open_cache(tmp_path, replace(IDENTITY, pooled_keep=2), create=True)
    cache.append([(b"k" * 16, score)])
    kept = cache.get(b"k" * 16).features[0]
    assert (kept.indices.tolist(), kept.values.tolist()) == ([2, 9], [-4.0, 3.0])
    report = rc.info(tmp_path)
    assert report.dropped_largest == (2.0,)
    assert report.dropped_share == (pytest.approx(5 / 30),)
    assert report.mean_nonzeros == (2.0,)


def test_info_counts_what_is_there(tmp_path):
    pairs = make_pairs(5)
    filled(tmp_path, pairs, shard_pairs=2)
    scores = [fake_score(p.prompt, r) for p in pairs for r in p.responses]
    report = rc.info(tmp_path)
    tokens = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert (report.rows, report.shards, report.tokens) == (10, 3, tokens)
    assert report.mean_logp == pytest.approx(sum(s.logps for s in scores) / tokens)
    assert report.mean_nonzeros == (np.mean([len(s.features[0].indices) for s in scores]),)
    assert (report.dropped_largest, report.dropped_share) == ((0.0,), (0.0,))
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.glob("rows-*"))


def test_verify_reports_the_largest_difference(tmp_path):
    pairs = make_pairs(6)
    cache = filled(tmp_path, pairs)
    exact = rc.verify_rows(cache, pairs, Scorer(), sample=99)
    assert (exact.rows, exact.logp_relative, exact.feature_relative) == (12, 0.0, 0.0)

    def shifted(group):
        scores = Scorer()(group)
        features = scores[0][1].features[0]
        values = (
            features.values
            + np.float32(0.25)
            * features.values.max()
            * np.eye(1, len(features.values), 0, dtype=np.float32)[0]
        )
        worse = replace(scores[0][1], features=(SparseFeatures(features.indices, values),))
        return [(scores[0][0], worse), *scores[1:]]

    report = rc.verify_rows(cache, pairs, shifted, sample=3, seed=1)
    assert (report.rows, report.logp_relative) == (6, 0.0)
    assert report.feature_relative == pytest.approx(0.25, rel=1e-5)
    assert "train.jsonl:" in report.worst
    with pytest.raises(DataError, match="nothing can be verified"):
        rc.verify_rows(cache, make_pairs(3, seed=8), Scorer())


def test_compare_scores_by_hand():
    def score(logps, indices, values):
        sparse = SparseFeatures(np.array(indices, np.int32), np.array(values, np.float32))
        return ResponseScore(logps, 1, (sparse,))

    a, b = score(-10.0, [1, 3], [2.0, 4.0]), score(-10.5, [1, 7], [2.0, 1.0])
    assert rc.compare_scores(a, b) == (0.05, 1.0)  # feature 3: 4 against 0, of a maximum of 4
    assert rc.compare_scores(score(-0.1, [], []), score(-0.2, [], [])) == (pytest.approx(0.1), 0.0)


def test_parts_dealt_out_in_turn_merge_to_the_bytes_of_one_run(tmp_path):
    pairs = make_pairs(11)
    filled(tmp_path / "whole", pairs, shard_pairs=2)
    groups = rc.plan(rc.open_cache(tmp_path / "x", IDENTITY, create=True), pairs, 2)
    for rank in range(2):
        mine = [pair for group in groups[rank::2] for pair in group]
        filled(tmp_path / f"part-{rank}", mine, shard_pairs=2)
    report = rc.merge([tmp_path / "part-0", tmp_path / "part-1"], tmp_path / "merged")
    assert (report.rows, report.duplicates) == (22, 0)
    assert folder_bytes(tmp_path / "merged") == folder_bytes(tmp_path / "whole")
    again = rc.merge([tmp_path / "part-1"], tmp_path / "merged")
    assert again.rows == 0
    assert again.duplicates == sum(len(p.keys) for group in groups[1::2] for p in group)
    assert folder_bytes(tmp_path / "merged") == folder_bytes(tmp_path / "whole")


def test_a_merge_keeps_the_first_of_two_rows_and_tells_how_they_differ(tmp_path):
    key, score = golden_rows()[0]
    other = [(key, replace(score, logps=-1.75)), (b"n" * 16, score)]
    rc.open_cache(tmp_path / "a", IDENTITY, create=True).append([(key, score)])
    rc.open_cache(tmp_path / "b", IDENTITY, create=True).append(other)
    report = rc.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert (report.rows, report.duplicates, report.largest_logp_difference) == (2, 1, 0.25)
    merged = rc.open_cache(tmp_path / "out", IDENTITY)
    assert (len(merged), merged.get(key).logps) == (2, -1.5)


def test_parts_of_two_identities_do_not_merge_and_leave_nothing(tmp_path):
    rc.open_cache(tmp_path / "a", IDENTITY, create=True).append(golden_rows())
    more = replace(IDENTITY, saes=(*IDENTITY.saes, ("z" * 64, "resid_post of block 0")))
    rc.open_cache(tmp_path / "b", more, create=True).append([(b"k" * 16, two_saes(-1.0))])
    foreign = replace(IDENTITY, model="n" * 64)
    rc.open_cache(tmp_path / "c", foreign, create=True).append(golden_rows())
    for other in ("b", "c"):
        for order in (["a", other], [other, "a"]):
            with pytest.raises(CacheMismatch):
                rc.merge([tmp_path / name for name in order], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_writes_one_json_line_a_row(tmp_path):
    rc.open_cache(tmp_path / "c", IDENTITY, create=True).append(golden_rows())
    assert rc.export(tmp_path / "c", tmp_path / "rows.jsonl") == 2
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert first == {
        "key": "000102030405060708090a0b0c0d0e0f",
        "logp": -1.5,
        "tokens": 3,
        "features": [{"indices": [1, 5], "values": [0.5, 2.0]}],
    }
    assert second["features"] == [{"indices": [], "values": []}]


def test_a_report_comes_after_each_shard(tmp_path):
    pairs, seen = make_pairs(5), []
    cache = rc.open_cache(tmp_path, IDENTITY, create=True)
    last = rc.fill(cache, pairs, Scorer(), shard_pairs=2, report=seen.append)
    assert [(r.pairs, r.total_pairs, r.rows, r.shards) for r in seen] == [
        (2, 5, 4, 1),
        (4, 5, 8, 2),
        (5, 5, 10, 3),
    ]
    assert last == seen[-1]
    assert last.tokens == sum(pair.tokens for pair in pairs)
