"""Latent scaling: a change that is in the stream is told from one that the SAE only says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from command_line import run, usual
from evaluated import own_cache, place  # noqa: F401

from fpo_mlx.errors import SaeError
from fpo_mlx.judge.scaling import Scaling, in_words
from fpo_mlx.records import SaeWeights


def sae_of(w_dec, b_dec=None) -> SaeWeights:
    rows = np.array(w_dec, np.float32)
    bias = np.zeros(rows.shape[1], np.float32) if b_dec is None else np.array(b_dec, np.float32)
    return SaeWeights(
        "relu", rows.T.copy(), np.zeros(len(rows), np.float32), w_dec=rows, b_dec=bias
    )


def test_one_token_by_hand():
    """d = (2, 0), b = (1, 1). After: h = (7, 1), f = 3, recon (6, 0), error 0.

    Before: f = 1 and h = (5, 1), so recon (2, 0), error (2, 0). unit = 9 * 4 = 36 and
    beta(y) = 3 * 2 * y_0 / 36 = y_0 / 6. kept = 1 * 3 / 9, claimed 2/3; hidden = 2/6;
    real = (7 - 5) / 6 = 1/3: half of what is claimed each; nu_error = (1/3) / 1;
    nu_reconstruction = (2/6) / (6/6).
    """
    sums = Scaling(sae_of([[2, 0], [0, 1]], [1, 1]), [0])
    before, after = np.array([[5.0, 1.0]]), np.array([[7.0, 1.0]])
    sums.add((before, after), (np.float32([[1, 0]]), np.float32([[3, 0]])))
    (one,) = sums.results()
    assert one.stronger == "after"
    assert one.claimed == pytest.approx(2 / 3)
    assert (one.real, one.hidden, one.elsewhere) == pytest.approx((0.5, 0.5, 0))
    assert (one.nu_error, one.nu_reconstruction) == pytest.approx((1 / 3, 1 / 3))


def planted(n=400, seed=0):
    """Streams and codes of two models; features 0 to 3 are planted, 4 to 9 are noise that stays.

    0 is new in the stream. 1 was there, and the SAE left it in its error. 2 was there as well, and
    feature 3 (nearly its direction) wrote it. 5 went away from the stream.
    """
    rng = np.random.default_rng(seed)
    rows, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    rows = rows[:10].copy()
    rows[3] = 0.98 * rows[2] + np.sqrt(1 - 0.98**2) * rows[3]
    acts = np.where(rng.random((n, 10)) < 0.3, rng.uniform(1, 3, (n, 10)), 0)
    acts[:, [0, 1, 2, 3]] = 0
    fired = {j: np.where(rng.random(n) < 0.3, rng.uniform(1, 3, n), 0) for j in (0, 1, 2)}
    before, after = acts.copy(), acts.copy()
    noise = 0.05 * rng.standard_normal((2, n, 32))
    before[:, 3] = fired[2]
    for j in (0, 1, 2):
        after[:, j] = fired[j]
    after[:, 5] = 0
    streams = [code @ rows + part for code, part in zip((before, after), noise, strict=True)]
    streams[0] += fired[1][:, None] * rows[1]  # in the error
    return sae_of(rows), streams, (before.astype(np.float32), after.astype(np.float32))


def test_real_and_spurious_changes_are_told_apart():
    sae, streams, acts = planted()
    sums = Scaling(sae, [0, 1, 2, 5])
    for part in (slice(0, 150), slice(150, 400)):
        sums.add([h[part] for h in streams], [a[part] for a in acts])
    new, hidden, elsewhere, gone = sums.results()
    assert [one.verdict for one in (new, hidden, elsewhere, gone)] == [
        "real", "hidden", "elsewhere", "real",
    ]  # fmt: skip
    assert gone.stronger == "before"
    assert new.real == pytest.approx(1, abs=0.05)
    assert hidden.hidden == pytest.approx(1, abs=0.05)
    assert hidden.nu_error == pytest.approx(1, abs=0.05)
    assert new.nu_error == pytest.approx(0, abs=0.05)
    assert elsewhere.elsewhere == pytest.approx(0.98, abs=0.05)
    assert elsewhere.nu_reconstruction == pytest.approx(0.98, abs=0.05)
    assert new.nu_reconstruction == pytest.approx(0, abs=0.05)
    for one in (new, hidden, elsewhere, gone):
        assert one.real + one.hidden + one.elsewhere == pytest.approx(1)


def test_the_factors_are_those_of_least_squares():
    """A slow oracle: each factor by np.linalg.lstsq on the flattened contributions."""
    sae, streams, acts = planted(n=60, seed=4)
    sae = replace(sae, b_dec=np.full(32, 0.3, np.float32))
    sums = Scaling(sae, [6])
    acts[1][:, 6] *= 1.5
    sums.add(streams, acts)
    (one,) = sums.results()
    f = acts[1][:, 6].astype(np.float64)
    basis = np.outer(f, sae.w_dec[6]).reshape(-1, 1)

    def beta(y):
        return np.linalg.lstsq(basis, y.reshape(-1), rcond=None)[0][0]

    recon = [a.astype(np.float64) @ sae.w_dec for a in acts]
    errors = [h - 0.3 - r for h, r in zip(streams, recon, strict=True)]
    assert one.claimed == pytest.approx(1 / 3)
    assert one.real * one.claimed == pytest.approx(beta(streams[1] - streams[0]), abs=1e-6)
    assert one.hidden * one.claimed == pytest.approx(beta(errors[0] - errors[1]), abs=1e-6)
    assert one.nu_reconstruction == pytest.approx(beta(recon[0]) / beta(recon[1]), abs=1e-6)
    assert one.nu_error == pytest.approx(beta(errors[0]) / (1 + beta(errors[1])), abs=1e-6)


def test_what_cannot_be_split_says_so():
    sae, streams, acts = planted()
    sums = Scaling(sae, [7])
    sums.add(streams, acts)
    (one,) = sums.results()
    assert (one.verdict, one.real) == ("small", None)
    assert in_words(one) == "small"
    silent = Scaling(sae, [3])
    silent.add(streams, (0 * acts[0], 0 * acts[1]))
    assert silent.results()[0].verdict == "small"
    for change in ({"w_dec": None}, {"transcoder": True}, {"normalize": "layer_norm"}):
        with pytest.raises(SaeError, match="scaling needs"):
            Scaling(replace(sae, **change), [0])


def test_the_command_tests_the_features_that_an_adapter_moved(place, tmp_path):
    out = tmp_path / "out.json"
    words = [
        "--adapter-path",
        place / "two",
        "--scaling",
        "--top-k",
        5,
        "--top",
        4,
        "--examples",
        0,
    ]
    words += ["--json", out, "--csv", tmp_path / "out.csv"]
    done = run("features", *usual(place), *words)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(out.read_text())["features"]
    assert len(rows) == 4
    for row in rows:
        tested = row["scaling"]
        if tested["real"] is not None:
            assert tested["real"] + tested["hidden"] + tested["elsewhere"] == pytest.approx(1)
        assert tested["verdict"] in done.stdout
    assert "nu_error" in (tmp_path / "out.csv").read_text().splitlines()[0]
