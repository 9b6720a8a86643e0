"""Losses that `evaluate --json` gives, made anew from the log-probs and facts of the same file."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

import oracle  # noqa: E402
from command_line import ROWS, lines, run, usual  # noqa: E402
from evaluated import K, own_cache, place  # noqa: E402, F401

from fpo_mlx.config import PRESETS  # noqa: E402
from fpo_mlx.records import PairFacts  # noqa: E402

SAYS = [
    {"agreement": 0.9, "weight": 0.5, "score_chosen": 8, "score_rejected": 6},
    {"agreement": 0.6, "score_chosen": 3.5, "score_rejected": 3},
    {"weight": 2, "score_chosen": 1, "score_rejected": 2},
    {"score_chosen": 1, "score_rejected": 1},
]
WORDS = {
    "nll": ["--nll-weight", 0.3],
    "robust": ["--label-smoothing", 0.2, "--robust-smoothing"],
    "scores": ["--score-margin", 0.3],
    "wpo": ["--wpo"],
}


def setup_of(o: dict) -> oracle.Setup:
    """The objective as the file itself says it."""
    links = {"rho": 0.2 if o["link"] == "sail" else 0.1, **o["link_parameters"]}
    return oracle.Setup(
        normalize=o["length_normalize"], margin=o["margin"], constraint=o["constraint"],
        beta=o["beta"], alpha=o["alpha"], gamma=o["gamma"], log_odds=o["log_odds"],
        link=o["link"], rho=links["rho"], preference=o["preference_weight"], nll=o["nll_weight"],
        smoothing=o["label_smoothing"], robust=o["robust_smoothing"],
        score_margin=o["score_margin"], wpo=o["wpo"],
    )  # fmt: skip


def loss_of(pair: dict, setup: oracle.Setup) -> float:
    """By the formulas of the documentation, from one record of the file."""
    facts = PairFacts(
        pair.get("agreement", 1.0), pair.get("weights", 1.0), pair.get("score_gaps", 0.0)
    )
    sides = [pair["chosen"], pair["rejected"]]

    def z(logp, tokens):
        p = math.exp(logp / tokens)
        return (
            math.log(p / (1 - p)) if setup.log_odds else logp / (tokens if setup.normalize else 1)
        )

    r = []
    for side in sides:
        own = z(side["logp"], side["tokens"])
        own -= z(side["ref_logp"], side["tokens"]) if setup.margin == "reference" else 0
        held = {"kl": "kl", "features": "feature_mse"}.get(setup.constraint)
        r.append(setup.beta * (own + (setup.alpha * side[held] if held else 0.0)))
    r[1] += setup.gamma * (setup.margin == "constant") + setup.score_margin * facts.score_gap
    r_w, r_l = (torch.tensor(value, dtype=torch.float64) for value in r)
    loss = setup.preference * float(oracle.preference_term(setup, r_w, r_l, facts))
    if setup.wpo:
        mean = sum((s["logp"] - s["log_collision"]) / s["tokens"] for s in sides)
        loss *= min(1.0, math.exp(mean))
    return facts.weight * (loss - setup.nll * sides[0]["logp"] / sides[0]["tokens"])


@pytest.mark.parametrize(
    ("preset", "term"), [*((name, None) for name in PRESETS), *(("fpo", t) for t in WORDS)]
)
def test_the_losses_of_the_json_come_of_its_log_probs(place, tmp_path, preset, term):
    data = lines(tmp_path / "valid.jsonl", *({**r, **s} for r, s in zip(ROWS, SAYS, strict=True)))
    words = ["--split", "valid", "--top-k", K, "--adapter-path", place / "one"]
    words += ["--objective", preset, *WORDS.get(term, []), "--json", tmp_path / "e.json"]
    words += ["--samples", 0]
    done = run("evaluate", *usual(place, data=data.parent), *words)
    assert done.exit_code == 0, done.stderr
    assert "3 of 4 pairs bring" in done.stderr or term == "scores"
    got = json.loads((tmp_path / "e.json").read_text())
    assert got["objective"]["preset"] == preset
    setup = setup_of(got["objective"])
    want = [loss_of(pair, setup) for pair in got["pairs"]]
    assert [pair["loss"] for pair in got["pairs"]] == pytest.approx(want, rel=1e-4)
    assert ("weights" in got["pairs"][3]) is False  # the usual is not written
    assert got["summary"]["agreement"] == pytest.approx((0.9 + 0.6 + 1 + 1) / 4)
    changed = dataclasses.replace(setup, preference=setup.preference + 1.0)
    assert (
        loss_of(got["pairs"][0], changed) != pytest.approx(want[0], rel=1e-4) or preset == "hinge"
    )


@pytest.mark.parametrize(
    "words", [["--target-drift", 0.1], ["--objective", "tdpo2", "--target-kl", 3, "--alpha", 0.7]]
)
def test_the_losses_of_a_run_with_a_target_are_of_the_preference_alone_as_train_validates(
    place, tmp_path, words
):
    words = [*words, "--split", "valid", "--top-k", K, "--adapter-path", place / "one"]
    done = run("evaluate", *usual(place), *words, "--samples", 0, "--json", tmp_path / "e.json")
    assert done.exit_code == 0, done.stderr
    got = json.loads((tmp_path / "e.json").read_text())
    setup = setup_of(got["objective"])
    assert setup.alpha == 0
    want = [loss_of(pair, setup) for pair in got["pairs"]]
    assert [pair["loss"] for pair in got["pairs"]] == pytest.approx(want, rel=1e-4)
