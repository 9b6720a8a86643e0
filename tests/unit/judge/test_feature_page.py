"""One feature's page: figures by hand, logits of an oracle, a page that hostile texts spare."""

from __future__ import annotations

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from command_line import lines, refused, run, usual
from evaluated import own_cache, place  # noqa: F401
from safetensors.numpy import load_file

from fpo_mlx.judge import feature_page
from fpo_mlx.judge.feature_page import activity, extremes, moved, similar
from fpo_mlx.judge.feature_report import Tally
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.records import Site
from fpo_mlx.report import render_feature
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.encode import encode


def test_figures_by_hand():
    """Two pairs: chosen (0, 4) and (1), rejected (0, 0, 0) and (3, 0)."""
    texts = [[0, 4], [0, 0, 0], [1], [3, 0]]
    seen = [np.float32(one) for one in texts]
    found = activity(seen, 4.0)
    assert (found.tokens, found.density, found.texts) == (8, 3 / 8, 3 / 4)
    assert found.mean_active == pytest.approx(8 / 3)
    assert (found.largest, found.chosen, found.rejected) == (4, 1.5, 0.75)
    assert found.counts == [0] * 5 + [1] + [0] * 9 + [1] + [0] * 3 + [1]  # bins of 0.2
    later = [one + np.float32(step) for one, step in zip(seen, (1, 3, 1, 3), strict=True)]
    assert moved(seen, later) == pytest.approx((2.0, 2 / np.std([1, 3, 1, 3], ddof=1)))
    assert moved(seen, seen) == (0.0, 0.0)


def test_equal_moves_have_the_effect_size_that_the_list_of_features_gives_them():
    before = [np.zeros(3, np.float32)] * 4
    for step in (0.3, -0.3):
        tally = Tally(1, 1, magnitude=False, weights={})
        for _ in range(2):
            tally.add(np.full((2, 1), np.float32(step)), np.zeros((2, 1)))
        after = [one + np.float32(step) for one in before]
        wanted = pytest.approx(np.sign(step) * 1e6)
        assert moved(before, after)[1] == tally.effect_sizes()[0] == wanted


def test_similar_features_by_hand():
    rows = np.float32([[1, 0], [2, 2], [0, 0], [-1, 0], [3, 0.3]])
    found = similar(rows, 0, 3)
    assert [i for i, _ in found] == [4, 1, 2]
    assert [c for _, c in found] == pytest.approx([3 / 9.09**0.5, 0.5**0.5, 0])


def test_logit_weights_are_the_decoder_row_through_the_norm_and_the_head(place):
    loaded = load_model(place / "model")
    norm = loaded.model.model.norm
    norm.weight = mx.array(np.random.default_rng(2).uniform(0.5, 2, norm.weight.shape[0]))
    gain = np.array(norm.weight)
    sae = load_sae(place / "sae")
    policy = Policy(loaded.model, loaded.config, [sae.site])
    found = feature_page.logit_weights(policy, sae.site, sae.w_dec[7])
    tensors = load_file(place / "model" / "model.safetensors")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).astype(np.float64)
    wanted = head @ (sae.w_dec[7] * gain)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    up, down = extremes(found, 3, lambda ids: str(ids[0]))
    assert [int(token) for token, _ in up] == np.argsort(-wanted)[:3].tolist()
    assert [int(token) for token, _ in down] == np.argsort(wanted)[:3].tolist()
    assert feature_page.logit_weights(policy, Site(1, "mlp_in"), sae.w_dec[7]) is None


def test_ids_that_the_model_never_says_are_neither_promoted_nor_suppressed(place):
    loaded, sae = load_model(place / "model"), load_sae(place / "sae")
    policy = Policy(loaded.model, loaded.config, [sae.site])
    plain = feature_page.logit_weights(policy, sae.site, sae.w_dec[7])
    head, never = policy.head, mx.arange(300) >= 290
    policy.head = lambda rows: mx.where(never, -mx.inf, head(rows))
    found = feature_page.logit_weights(policy, sae.site, sae.w_dec[7])
    np.testing.assert_array_equal(found[290:], 0)
    np.testing.assert_array_equal(found[:290], plain[:290])


def test_the_command_shows_what_the_sae_says_before_and_after(place, tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    words = ["features", "show", 7, *usual(place), "--examples", 2]
    done = run(*words, "--json", out, "--output", page, "--adapter-path", place / "two")
    assert done.exit_code == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["kind"], found["feature"], found["pairs"]) == ("features show", 7, 4)
    sides = found["before"], found["after"]
    for side in sides:
        assert sum(side["counts"]) == round(side["density"] * side["tokens"])
    mean = [(side["chosen"] + side["rejected"]) / 2 for side in sides]
    assert found["change"] == pytest.approx(mean[1] - mean[0], rel=1e-4, abs=1e-7)
    assert found["scaling"]["verdict"] in ("real", "hidden", "elsewhere", "small")
    assert len(found["promoted"]) == len(found["suppressed"]) == len(found["similar"]) == 10
    assert found["contexts"][0]["activation"] == pytest.approx(found["after"]["largest"])
    assert "promotes:" in done.stdout
    assert "█" in done.stdout
    assert "After" in page.read_text()
    refused(run(*words, "--output", page), 2, "--overwrite")
    refused(run("features", "show", 48, *usual(place)), 2, "0 to 47")


def test_an_sae_that_latent_scaling_cannot_read_has_a_page_without_it(place, tmp_path):
    shutil.copytree(place / "sae", tmp_path / "sae")
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    (tmp_path / "sae/cfg.json").write_text(json.dumps(config | {"centred": True}))
    out = tmp_path / "out.json"
    words = usual(place, sae=tmp_path / "sae")
    done = run("features", "show", 7, *words, "--adapter-path", place / "two", "--json", out)
    assert done.exit_code == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["after"]["tokens"] == found["before"]["tokens"]
    assert found["scaling"] is None


def test_a_constraint_without_an_sae_is_refused(place, tmp_path):
    lines(tmp_path / "run.yaml", {"constraint": "activations"})  # JSON is YAML too
    words = ["-c", tmp_path / "run.yaml", *usual(place)]
    refused(run("features", "show", 7, *words), 2, "leave --constraint out")
    more = ["--adapter-path", place / "two", "--scaling"]
    refused(run("features", *words, *more), 2, "leave --constraint out")


def test_density_is_that_of_the_numpy_encoder(place, tmp_path):
    out = tmp_path / "out.json"
    run("features", "show", 5, *usual(place), "--json", out, "--limit", 1)
    found = json.loads(out.read_text())
    from fpo_mlx.config import load_config
    from fpo_mlx.pipeline import open_job, read_pairs

    words = {"model": str(place / "model"), "sae": (str(place / "sae"),)}
    job = open_job(load_config(words | {"data": str(place / "data")}), say=print, need_sae=True)
    pair = read_pairs(job, "valid", print)[0]
    loaded = load_model(place / "model")
    policy = Policy(loaded.model, loaded.config, [job.saes[0].site])
    acts = [
        encode(load_sae(place / "sae"), np.array(policy.answer_rows(pair.prompt, r).tapped[0]))
        for r in pair.responses
    ]
    own = np.concatenate([part[:, 5] for part in acts])
    assert found["before"]["density"] == pytest.approx((own > 0).mean())
    assert found["before"]["largest"] == pytest.approx(own.max(), rel=1e-4)


HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">« »'


def test_hostile_texts_stay_text_and_the_page_asks_for_nothing(place, tmp_path):
    out = tmp_path / "out.json"
    labels = lines(tmp_path / "labels.json", {"7": HOSTILE})
    done = run("features", "show", 7, *usual(place), "--json", out, "--labels", labels)
    assert done.exit_code == 0, done.stderr
    page = json.loads(out.read_text())
    assert page["label"] == HOSTILE
    page["contexts"] = [
        {"activation": 1.0, "token": HOSTILE, "text": f"a«{HOSTILE}»b", "where": HOSTILE}
    ]
    page["promoted"][0][0] = page["suppressed"][0][0] = HOSTILE
    page["similar"][0][2] = page["sae"] = page["model"] = HOSTILE
    html = render_feature(page)
    assert "<script" not in html
    assert "<img" not in html
    assert "<mark>&lt;script&gt;" in html
    assert not re.findall(r"(?:src|href)=\"(?!#|data:,|https://www\.neuronpedia\.org/)", html)
    assert "url(" not in html
    assert "default-src 'none'" in html
