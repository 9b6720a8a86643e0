"""--project-out against the float64 oracle, whose hook takes them out by least squares."""

from __future__ import annotations

import json
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import oracle
import pytest
import tiny_models
import torch
from command_line import FEATURES, ROWS, lines, random_sae, refused, run, train, usual
from gradients import losses_and_grads
from helpers import K, random_pairs, scorer_with_lora
from helpers import random_sae as sae_at
from oracle_sites import _blocks
from test_parity import setup_of
from tiny_make import for_transformers

from fpo_mlx import cache
from fpo_mlx.config import PRESETS, Objective
from fpo_mlx.records import Projection, Site
from fpo_mlx.reference import open_backend
from fpo_mlx.sae.convert import write_saelens

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PAIRS = [(9, 5, 8), (4, 7, 3), (1, 4, 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.MAKERS[name](root / name) for name in ("llama", "gemma2")}


def directions(count: int = 4, width: int = tiny_models.HIDDEN, seed: int = 5) -> np.ndarray:
    """Rows as of a decoder, neither of one length nor orthogonal; the last depends on others."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, width)) * rng.uniform(0.5, 3, size=(count, 1))
    return np.vstack([rows, rows[:1] - 2 * rows[1:2]]).astype(np.float32)


@contextmanager
def taken_out(model, site: Site, rows: np.ndarray):
    """h - W^T (W W^T)^+ W h at the site, in float64, in every pass."""
    w = torch.tensor(rows, dtype=torch.float64)
    away = w.T @ torch.linalg.pinv(w @ w.T, rtol=1e-9) @ w

    def after(module, args, out):
        value = out[0] if isinstance(out, tuple) else out
        changed = value - value @ away
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    block = _blocks(model)[site.layer]
    name = {"resid_post": "", "mlp_out": "mlp", "attn_out": "self_attn"}[site.kind]
    hook = block.get_submodule(name).register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def test_a_projection_by_hand():
    """Out of (3, 4, 5) the directions (2, 0, 0) and (1, 1, 0) take all but the third."""
    rows = np.array([[2.0, 0, 0], [1, 1, 0], [3, 1, 0]], np.float32)
    one = Projection.of(Site(0), rows)
    assert one.basis.shape == (3, 2)
    np.testing.assert_allclose(one.basis.T @ one.basis, np.eye(2), atol=1e-6)
    h = np.array([3.0, 4, 5])
    np.testing.assert_allclose(h - h @ one.basis @ one.basis.T, [0, 0, 5], atol=1e-5)


WAYS = [(p, s, c) for p in ("fpo", "dpo") for s in (False, True) for c in (False, True)]


@pytest.mark.parametrize(
    ("preset", "share", "checkpoint"), [*WAYS, ("tdpo2", True, True), ("orpo", True, False)]
)
def test_losses_and_gradients_equal_the_oracle_in_every_way_to_run_them(
    folders, preset, share, checkpoint
):
    check(folders["llama"], preset, Site(1), share_prompt=share, grad_checkpoint=checkpoint)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_losses_and_gradients_equal_the_oracle_at_another_site_than_the_constraint_s(
    folders, family
):
    check(folders[family], "fpo", Site(0), tap=Site(1))


def test_losses_and_gradients_equal_the_oracle_at_the_output_of_an_mlp(folders):
    check(folders["llama"], "fpo", Site(1, "mlp_out"), grad_checkpoint=True)


def check(folder, preset, site, tap=None, **how):
    objective = Objective(**{**PRESETS[preset], "top_k": K})
    saes = [sae_at("relu", 32, tap or site)] if objective.pooled else []
    pairs, rows = random_pairs(PAIRS), directions()
    scorer, values = scorer_with_lora(
        folder, objective, saes, projections=[Projection.of(site, rows)], **how
    )
    (losses, u, *_), measures, grads = losses_and_grads(scorer, values, pairs)
    model = oracle.load_oracle(folder)
    lora = oracle.attach_lora(model, values, scale=2.0)
    plain, _ = oracle.loss_and_grads(model, lora, pairs, setup_of(objective), taps=saes)
    with taken_out(model, site, rows):
        want, want_grads = oracle.loss_and_grads(model, lora, pairs, setup_of(objective), taps=saes)
    np.testing.assert_allclose(losses, [row["loss"] for row in want], rtol=1e-4)
    np.testing.assert_allclose(u, [row["u"] for row in want], rtol=1e-4, atol=1e-4)
    logps = [row["logps/chosen"] for row in want]
    np.testing.assert_allclose(np.array(measures.logps)[0], logps, rtol=1e-4)
    for name, got in grads.items():
        size = np.abs(want_grads[name]).max()
        np.testing.assert_allclose(got, want_grads[name], rtol=1e-3, atol=1e-3 * size, err_msg=name)
    changed = [abs(a["logps/chosen"] - b["logps/chosen"]) for a, b in zip(plain, want, strict=True)]
    assert min(changed) > 0.01, "the projection does nothing here, so the test would say nothing"


@pytest.mark.parametrize("preset", ["fpo", "dpo"])
def test_the_gradient_at_the_site_has_no_part_in_the_span(folders, preset):
    """By the stream itself: the loss of a small addition to it, before the projection."""
    objective, site = Objective(**{**PRESETS[preset], "top_k": K}), Site(1)
    saes = [sae_at("relu", 32, site)]
    projection = Projection.of(site, directions())
    scorer, values = scorer_with_lora(
        folders["llama"], objective, saes, share_prompt=False, projections=[projection]
    )
    pairs = random_pairs(PAIRS)
    refs = scorer.reader.scores(pairs)
    from fpo_mlx.model import adapters

    adapters.update(scorer.policy.model, {k: mx.array(v) for k, v in values.items()})

    def loss(addition):
        with scorer.policy._taps[0].intervening(lambda h: h + addition):
            return scorer.losses(pairs, refs, grad=True)[0].losses.mean()

    width = max(len(p.prompt) + len(r) - 1 for p in pairs for r in p.responses)
    slope = np.array(mx.grad(loss)(mx.zeros((2 * len(pairs), width, 32))))
    assert np.abs(slope).max() > 1e-5
    assert np.abs(slope @ projection.basis).max() < 1e-5 * np.abs(slope).max()


@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "mlp_out", "attn_z", "mlp_in"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_backends_score_the_reference_without_the_directions(folders, family, kind):
    site, pairs = Site(1, kind), random_pairs(PAIRS)
    sae = sae_at("relu", 32, Site(2))
    projection = Projection.of(site, directions())
    scores = []
    for backend, folder in (("mlx", folders[family]), ("torch", for_transformers(folders[family]))):
        engine = open_backend(backend, model_path=folder, saes=[sae], projections=[projection])
        scores.append([side for pair in engine.score(pairs) for side in pair])
    plain = open_backend("mlx", model_path=folders[family], saes=[sae]).score(pairs)
    for ours, theirs in zip(*scores, strict=True):
        assert ours.logps == pytest.approx(theirs.logps, rel=1e-4)
        dense = [side.features[0].to_dense(48) for side in (ours, theirs)]
        np.testing.assert_allclose(dense[0], dense[1], atol=1e-4)
    assert abs(plain[0][0].logps - scores[0][0].logps) > 0.01


# The command --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("projected")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    lines(root / "data/train.jsonl", *ROWS)
    (root / "out.json").write_text(json.dumps({"3": 1, "40": 1}))
    (root / "same.csv").write_text("feature,weight\n40,9\n3,0\n")
    return root


def test_training_scores_its_own_reference_and_the_run_knows_what_was_taken_out(place, tmp_path):
    named = ["--project-out", place / "out.json"]
    done = run("precompute", *usual(place), *named, "--output", tmp_path / "ref")
    assert done.exit_code == 0, done.stderr
    assert "takes 2 directions out of the resid_post of block 1" in done.stderr
    assert run("precompute", *usual(place), "--output", tmp_path / "plain").exit_code == 0
    found = [cache.read_identity(tmp_path / name) for name in ("ref", "plain")]
    assert found[0].projected is not None
    assert found[1].projected is None
    assert "projected" not in found[1].to_json(), "older caches keep their names"
    done = train(place, tmp_path / "run", *named, "--reference", tmp_path / "ref")
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["fingerprints"]["projected"] == found[0].projected
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5), "policy = reference at the start"
    words = [*named, "--reference", tmp_path / "plain"]
    refused(train(place, tmp_path / "other", *words), 1, "projected: cache nothing, this run")


def test_the_same_features_in_another_file_are_the_same_run_and_others_are_not(place, tmp_path):
    named = ["--project-out", place / "out.json"]
    assert train(place, tmp_path / "run", *named).exit_code == 0
    same = ["--project-out", place / "same.csv", "--iters", 3, "--resume"]
    assert train(place, tmp_path / "run", *same).exit_code == 0
    refused(train(place, tmp_path / "run", "--iters", 4, "--resume"), 2, "fingerprints.projected")


def test_evaluate_judges_the_model_as_it_will_be_used(place, tmp_path):
    """A YAML with project_out changes nothing: no projection, and the plain reference."""
    named = ["--project-out", place / "out.json"]
    assert train(place, tmp_path / "run", *named).exit_code == 0
    (tmp_path / "run.yaml").write_text(f"project_out: {place / 'out.json'}\n")
    words = ["--top-k", 5, "--split", "train", "--adapter-path", tmp_path / "run"]
    words += ["--samples", 2, "--max-tokens", 8]
    results = []
    for more in (["-c", tmp_path / "run.yaml"], []):
        out = tmp_path / f"{len(results)}.json"
        done = run("evaluate", *usual(place), *words, *more, "--json", out)
        assert done.exit_code == 0, done.stderr
        results.append(json.loads(out.read_text())["summary"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("content", "parts"),
    [({str(FEATURES): 1}, [f"0 to {FEATURES - 1}"]), ({}, ["names no feature"])],
)
def test_a_file_that_cannot_be_used_is_refused(place, tmp_path, content, parts):
    (tmp_path / "bad.json").write_text(json.dumps(content))
    done = train(place, tmp_path / "run", "--project-out", tmp_path / "bad.json")
    refused(done, 2, "--project-out", *parts)


def test_features_without_an_sae_are_refused(place, tmp_path):
    words = ["--project-out", place / "out.json", "--objective", "dpo"]
    refused(train(place, tmp_path / "run", *words, sae=None), 2, "--sae is missing")
