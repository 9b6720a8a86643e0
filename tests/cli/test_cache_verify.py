"""`cache verify`: a cache that is not of this model any more is refused, and what differs named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("mlx.core")

from command_line import refused, run, usual  # noqa: E402
from evaluated import own_cache, place  # noqa: E402, F401

from fpo_mlx import cache  # noqa: E402
from fpo_mlx.records import ResponseScore, SparseFeatures  # noqa: E402


def more_likely(score: ResponseScore) -> ResponseScore:
    return replace(score, logps=1.1 * score.logps)


def stronger(score: ResponseScore) -> ResponseScore:
    (pooled,) = score.features
    return replace(score, features=(SparseFeatures(pooled.indices, 1.1 * pooled.values),))


@pytest.mark.parametrize(
    ("change", "said"),
    [(more_likely, "log-probs by 0.091"), (stronger, "log-probs by .*, features by 0.091")],
)
def test_one_row_that_differs_fails_the_whole_cache_unless_it_may(place, tmp_path, change, said):
    made = run("precompute", *usual(place), "--output", tmp_path / "exact")
    assert made.exit_code == 0, made.stderr
    identity = cache.read_identity(tmp_path / "exact")
    exact = cache.open_cache(tmp_path / "exact", identity)
    (key, first), *rest = [(key, exact.get(key)) for key in exact.keys()]  # noqa: SIM118
    other = cache.open_cache(tmp_path / "other", identity, create=True, made=exact.made)
    other.append([(key, change(first)), *rest])
    words = ["cache", "verify", tmp_path / "other", *usual(place)]
    failed = run(*words)
    refused(failed, 1, f"{tmp_path / 'other'} differs", f"row {key.hex()}", "--tolerance")
    assert re.search(said, failed.stderr), failed.stderr
    assert run(*words, "--tolerance", 1).exit_code == 0
