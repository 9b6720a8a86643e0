"""Feature control: the file of weights, and what weights do to D, its gradient and a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_mlx.data.feature_files import read_labels, read_weights, weights_fingerprint, write_weights
from fpo_mlx.errors import ConfigError

F = 48

# The file -----------------------------------------------------------------------------------------

FORMS = {
    "w.json": '{"7": 4.0, "3": 0}',
    "w.yaml": "7: 4.0\n3: 0\n",
    "w.yml": "'7': 4\n'3': 0.0\n",
    "w.csv": "feature,weight,label\n7,4.0,lists\n3,0,\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_json_yaml_and_csv_say_the_same(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name])
    assert read_weights(tmp_path / name, [F]) == ({7: 4.0, 3: 0.0},)


def test_several_saes_have_a_mapping_each(tmp_path):
    (tmp_path / "w.json").write_text('[{"7": 4.0}, {"50": 2}]')
    (tmp_path / "w.csv").write_text("sae,feature,weight\n0,7,4\n1,50,2\n")
    for name in ("w.json", "w.csv"):
        assert read_weights(tmp_path / name, [F, 64]) == ({7: 4.0}, {50: 2.0})


BAD = {
    "out of range": ('{"48": 1}', ("feature 48", "0 to 47")),
    "below zero": ('{"-1": 1}', ("feature -1", "0 to 47")),
    "negative": ('{"3": -0.5}', ("feature 3", "-0.5", "0 or more")),
    "infinite": ('{"3": .inf}', ("feature 3", "finite")),
    "not a number": ('{"3": .nan}', ("feature 3", "finite")),
    "a text": ('{"3": "much"}', ("feature 3", "much")),
    "a truth": ('{"3": true}', ("feature 3", "True")),
    "no index": ('{"cats": 1}', ("feature cats", "0 to 47")),
    "half an index": ("3.5: 1", ("feature 3.5", "0 to 47")),
    "twice": ('{"3": 1, "3": 2}', ("feature 3", "twice")),
    "no such sae": ('[{"3": 1}, {"4": 1}]', ("no SAE 1",)),
    "nothing": ("{}", ("names no feature",)),
    "no mapping": ("3", ("found int",)),
    "a list of numbers": ("[3, 4]", ("Wanted",)),
    "deep": ("[" * 3000, ()),
    "huge": ("{3: 1" + "0" * 400 + "}", ("feature 3",)),
    "broken": ("{3: ", ("neither JSON nor YAML",)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_and_says_what_is_wrong(tmp_path, case):
    text, parts = BAD[case]
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_weights(tmp_path / "w.json", [F])
    for part in ("--feature-weights", "w.json", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "feature\n3\n"])
def test_a_csv_without_the_columns_is_refused(tmp_path, text):
    (tmp_path / "w.csv").write_text(text)
    with pytest.raises(ConfigError, match="feature"):
        read_weights(tmp_path / "w.csv", [F])


def test_every_fault_is_named_at_once_and_a_missing_file_too(tmp_path):
    (tmp_path / "w.json").write_text('{"48": 1, "3": -1}')
    with pytest.raises(ConfigError, match=r"(?s)feature 48.*feature 3"):
        read_weights(tmp_path / "w.json", [F])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_weights(tmp_path / "none.json", [F])


weights_of = st.dictionaries(st.integers(0, F - 1), st.floats(0, 1e6), min_size=1)


@given(first=weights_of, second=weights_of)
def test_what_is_written_is_read_back(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("w")
    rows = [{"sae": 0, "feature": i, "weight": w} for i, w in first.items()]
    rows += [{"sae": 1, "feature": i, "weight": w} for i, w in second.items()]
    for name in ("w.json", "w.yaml", "w.csv"):
        write_weights(folder / name, rows)
        assert read_weights(folder / name, [F, F]) == (first, second)


def test_the_fingerprint_is_of_what_is_said():
    assert weights_fingerprint(({3: 1.0, 7: 2.0},)) == weights_fingerprint(({7: 2.0, 3: 1.0},))
    assert weights_fingerprint(({3: 1.0},)) != weights_fingerprint(({3: 2.0},))
    assert weights_fingerprint(({3: 1.0}, {})) != weights_fingerprint(({}, {3: 1.0}))
    assert weights_fingerprint(()) is None


def test_labels_are_read_from_our_forms_and_from_neuronpedias(tmp_path):
    (tmp_path / "a.json").write_text('{"7": "lists"}')
    (tmp_path / "b.csv").write_text("feature,label\n7,lists\n")
    exported = [{"modelId": "m", "layer": "l", "index": "7", "description": "lists"}]
    (tmp_path / "c.json").write_text(json.dumps(exported))
    for name in ("a.json", "b.csv", "c.json"):
        assert read_labels(tmp_path / name) == ({7: "lists"},)


GRIN = "grin \N{GRINNING FACE}"


@pytest.mark.parametrize("more", ["", "\n# YAML, no JSON"])
def test_an_emoji_that_json_wrote_as_two_halves_is_one_character(tmp_path, more):
    (tmp_path / "a.json").write_text(json.dumps({"7": GRIN}) + more)
    assert read_labels(tmp_path / "a.json") == ({7: GRIN},)


def test_half_an_emoji_at_the_end_of_a_cut_label_can_still_be_printed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"7": "grin \ud83d"}))
    assert read_labels(tmp_path / "a.json") == ({7: "grin \N{REPLACEMENT CHARACTER}"},)


def test_json_may_be_indented_with_tabs_and_a_key_that_stands_twice_is_still_seen(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps([{"7": 4.0}, {"50": 2}], indent="\t"))
    assert read_weights(tmp_path / "w.json", [F, 64]) == ({7: 4.0}, {50: 2.0})
    (tmp_path / "w.json").write_text('{\n\t"3": 1,\n\t"3": 2\n}')
    with pytest.raises(ConfigError, match="feature 3: stands there twice"):
        read_weights(tmp_path / "w.json", [F])


@given(weights=weights_of, labels=st.dictionaries(st.integers(0, F - 1), st.text(), min_size=1))
def test_the_same_text_says_the_same_as_json_and_as_yaml(tmp_path_factory, weights, labels):
    path = tmp_path_factory.mktemp("w") / "w.json"
    exported = [{"index": str(index), "description": text} for index, text in labels.items()]
    for more in ("", "\n# YAML, no JSON"):
        path.write_text(json.dumps(weights) + more)
        assert read_weights(path, [F]) == (weights,)
        for said in (labels, exported):
            path.write_text(json.dumps(said) + more)
            assert read_labels(path) == (labels,)


# D and its gradient, against the oracle -----------------------------------------------------------

mx = pytest.importorskip("mlx.core")

import oracle  # noqa: E402
import tiny_models  # noqa: E402
from gradients import losses_and_grads  # noqa: E402
from helpers import K, random_pairs, random_sae, scorer_with_lora  # noqa: E402

from fpo_mlx.config import Objective  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.records import Site  # noqa: E402
from fpo_mlx.train.scoring import Scorer  # noqa: E402

SIZES = [(9, 5, 8), (4, 7, 3), (1, 4, 4)]
ALL = dict.fromkeys(range(F), 1.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("w") / "llama")


def weighted(llama, weights, sizes=SIZES, **changes):
    """(losses, u, measures, gradients, adapters) of some pairs with these weights."""
    objective = Objective(top_k=K, alpha=5.0, **changes)
    plain, values = scorer_with_lora(llama, objective, [random_sae("topk", 32, Site(1))])
    scorer = Scorer(plain.policy, plain.encoders, objective, feature_weights=[weights])
    (losses, u, *_), measures, grads = losses_and_grads(scorer, values, random_pairs(sizes))
    return losses, u, measures, grads, values


@pytest.mark.parametrize("scale", ["raw", "reference"])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize(
    "weights",
    [
        {3: 2.5, 17: 0.0, 40: 7.0},
        {i: 0.25 * i for i in range(0, F, 2)},
    ],
    ids=["three", "half"],
)
def test_weighted_d_and_its_gradient_equal_the_oracle(llama, weights, stop, scale):
    given_ = {"stop_gradient": stop, "feature_scale": scale}
    losses, u, measures, grads, values = weighted(llama, weights, **given_)
    setup = oracle.Setup(
        k=K, alpha=5.0, stop_gradient=stop, feature_scale=scale,
        named=tuple(weights), weights=weights,
    )  # fmt: skip
    model = oracle.load_oracle(llama)
    lora = oracle.attach_lora(model, values, scale=2.0)
    sae = random_sae("topk", 32, Site(1))
    want, want_grads = oracle.loss_and_grads(model, lora, random_pairs(SIZES), setup, taps=[sae])
    np.testing.assert_allclose(u, [w["u"] for w in want], rtol=1e-4, atol=1e-5)
    if scale == "raw":
        got = np.array(measures.distances)
        for side, name in enumerate(("chosen", "rejected")):
            wanted = [w[f"features/{name}"] for w in want]
            np.testing.assert_allclose(got[side], wanted, rtol=1e-4)
    for name, got in grads.items():
        size = np.abs(want_grads[name]).max()
        np.testing.assert_allclose(got, want_grads[name], rtol=1e-3, atol=1e-3 * size)
    _, plain_u, *_ = weighted(llama, {}, **given_)
    assert np.abs(np.array(plain_u) - np.array(u)).max() > 1e-3  # the weights are in force


def features_of_i(llama, sizes):
    """I of every response, from pooled features and a sort in numpy."""
    objective = Objective(top_k=K)
    scorer, values = scorer_with_lora(llama, objective, [random_sae("topk", 32, Site(1))])
    refs = scorer.reader.scores(random_pairs(sizes))
    adapters.update(scorer.policy.model, {k: mx.array(v) for k, v in values.items()})
    own = scorer.reader.scores(random_pairs(sizes))

    def top(side):
        dense = side.features[0].to_dense(F)
        return {i for i in np.argsort(-dense, kind="stable")[:K].tolist() if dense[i] != 0}

    scored = [zip(*both, strict=True) for both in zip(own, refs, strict=True)]
    return [top(policy) | top(ref) for pair in scored for policy, ref in pair]


def test_weight_one_for_features_of_i_leaves_the_loss_and_holds_the_chosen(llama):
    """u is what it was; the gradient gains that of the named features' D(chosen)."""
    sizes = SIZES[:1]
    chosen, rejected = features_of_i(llama, sizes)
    always = chosen & rejected
    assert len(always) >= 2
    plain, named = (weighted(llama, w, sizes) for w in ({}, dict.fromkeys(always, 1.0)))
    np.testing.assert_allclose(plain[1], named[1], rtol=1e-6)
    assert any(np.abs(named[3][n] - grad).max() > 1e-4 for n, grad in plain[3].items())


def test_a_step_against_the_gradient_brings_a_held_feature_of_the_chosen_back(llama):
    """With the stop-gradient too: without a name the chosen response's features are free to go."""
    outside = sorted(set(range(F)) - set.union(*features_of_i(llama, SIZES)))
    pairs, objective = random_pairs(SIZES), Objective(top_k=K, alpha=5.0)
    after = {}
    for weight in (0.0, 100.0):
        plain, values = scorer_with_lora(llama, objective, [random_sae("topk", 32, Site(1))])
        weights = [dict.fromkeys(outside, weight)]
        scorer = Scorer(plain.policy, plain.encoders, objective, feature_weights=weights)
        refs = scorer.reader.scores(pairs)
        _, _, grads = losses_and_grads(scorer, values, pairs)
        size = max(np.abs(g).max() for g in grads.values())
        stepped = {n: mx.array(v - 1e-3 * grads[n] / size) for n, v in values.items()}
        adapters.update(scorer.policy.model, stepped)
        names = [dict.fromkeys(outside, 100.0)]
        judge = Scorer(plain.policy, plain.encoders, objective, feature_weights=names)
        both = [s.losses(pairs, refs, grad=False)[1].distances for s in (plain, judge)]
        plain_d, named_d = (np.array(d)[0].sum() for d in both)
        after[weight] = named_d - plain_d
    assert after[100.0] < 0.999 * after[0.0]


def test_a_named_feature_is_in_i_where_it_would_not_be(llama):
    outside = set(range(F)) - set.union(*features_of_i(llama, SIZES))
    plain, named = (weighted(llama, w) for w in ({}, dict.fromkeys(outside, 1.0)))
    assert (np.array(named[2].distances) >= np.array(plain[2].distances)).all()
    assert np.array(named[2].distances).sum() > 1.01 * np.array(plain[2].distances).sum()


def test_weight_zero_takes_a_features_gradient_away(llama):
    """All of I at zero: what is left is the gradient without a constraint."""
    free = weighted(llama, dict.fromkeys(range(F), 0.0))
    none = weighted(llama, {}, constraint="none")
    np.testing.assert_array_equal(np.array(free[2].distances), 0)
    np.testing.assert_allclose(free[1], none[1], rtol=1e-6, atol=1e-7)
    for name, grad in none[3].items():
        np.testing.assert_allclose(free[3][name], grad, rtol=1e-5, atol=1e-8)


def test_weights_reach_d_of_the_second_sae_only(llama):
    saes = [random_sae("topk", 32, Site(1)), random_sae("relu", 32, Site(2), seed=5)]
    objective = Objective(top_k=K)
    plain, values = scorer_with_lora(llama, objective, saes)
    fresh, got = dict(adapters.parameters(plain.policy.model)), []
    for weights in ([], [{}, dict.fromkeys(range(F), 0.0)], [dict.fromkeys(range(F), 0.0), {}]):
        adapters.update(plain.policy.model, fresh)
        scorer = Scorer(plain.policy, plain.encoders, objective, feature_weights=weights)
        got.append(np.array(losses_and_grads(scorer, values, random_pairs(SIZES))[1].distances))
    np.testing.assert_allclose(got[0], got[1] + got[2], rtol=1e-5)
    assert got[1].min() > 0
    assert got[2].min() > 0


# The command line ---------------------------------------------------------------------------------


def test_weights_are_part_of_the_run_and_of_the_resume_check(tmp_path):
    from fpo_mlx.train.checkpoint import STATE, check_resumable

    def run(weights, file):
        fingerprints = {"named_features": weights_fingerprint(weights)}
        return {"settings": {"feature_weights": file}, "fingerprints": fingerprints}

    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).touch()
    (tmp_path / "run.json").write_text(json.dumps(run(({3: 1.0},), "a.json")))
    check_resumable(tmp_path, run(({3: 1.0},), "b.csv"))  # another file that says the same
    for other in (({3: 2.0},), ()):
        with pytest.raises(ConfigError, match=r"fingerprints\.named_features"):
            check_resumable(tmp_path, run(other, "a.json"))
