"""The product against the independent float64 oracle: scores, losses, gradients of every preset."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import oracle
import pytest
import tiny_models
from gradients import losses_and_grads  # noqa: E402, F401

from fpo_mlx.config import PRESETS, Objective
from fpo_mlx.records import PairFacts, Site

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from helpers import K, random_pairs, random_sae, scorer_with_lora  # noqa: E402

from fpo_mlx.core.links import LINKS  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.train import guard  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    makers = {"llama": tiny_models.tiny_llama, "gemma2": tiny_models.tiny_gemma2}
    return {name: make(root / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def truth(folders):
    """The oracle's (sides, LoRA parameters) per (family, taps), scored once for all objectives."""
    kept: dict = {}

    def of(family, key, saes, values, pairs):
        if (family, key) not in kept:
            model = oracle.load_oracle(folders[family])
            lora = oracle.attach_lora(model, values, scale=2.0)
            kept[family, key] = oracle.scored(model, pairs, taps=saes), lora
        sides, lora = kept[family, key]
        assert set(lora) == set(values)
        for name, array in values.items():
            np.testing.assert_array_equal(lora[name].detach().numpy(), array.astype(np.float64))
        return sides, lora

    return of


LN2 = math.log(2)
FIRST = {  # losses at policy = reference that no pair can change
    "fpo": LN2, "dpo": LN2, "tdpo1": LN2, "tdpo2": LN2,
    "ipo": 25.0,  # (1 / (2 beta))^2
    "hinge": 1.0,
    "apo-zero": 1.0, "apo-down": 1.0,  # two sigmoids of 0
    "ada-dpo": 0.01,  # tau_min rho
    "sail-ddp": LN2 - 0.5 * 0.2 * 0.4 * LN2**2,
}  # fmt: skip
CASES = [(name, {}, "topk") for name in PRESETS]
CASES += [("fpo", {}, kind) for kind in ("relu", "jumprelu", "gated", "abstopk", "groupmax")]
CASES += [
    ("fpo", {"stop_gradient": False}, "jumprelu"),
    ("fpo", {"feature_scale": "reference"}, "topk"),
    ("fpo", {"constraint": "activations"}, "identity"),
    ("fpo", {"length_normalize": False}, "relu"),
    ("fpo", {"margin": "constant", "gamma": 0.3}, "relu"),
    ("dpo", {"constraint": "kl", "alpha": 0.7}, "relu"),
]
TERMS = {
    "nll": {"nll_weight": 0.3},
    "smoothed": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2, "robust_smoothing": True},
    "score margin": {"score_margin": 0.4},
    "wpo": {"wpo": True},
    "weak preference": {"preference_weight": 0.3, "nll_weight": 0.1},
    "log-odds": {"log_odds": True},
    "all": {
        "nll_weight": 0.3, "label_smoothing": 0.1, "score_margin": -0.2, "wpo": True,
        "preference_weight": 0.7,
    },
}  # fmt: skip
CASES += [(name, term, "topk") for name in ("fpo", "dpo", "tdpo2") for term in TERMS.values()]
CASES += [("fpo", {"link": link, "alpha": 2.0}, "topk") for link in LINKS]
CASES += [(name, TERMS["all"], "topk") for name in ("simpo", "ipo", "apo-down", "asft", "ada-dpo")]
FACTS = [PairFacts(0.9, 0.5, 2.0), PairFacts(0.6, 1.0, 0.0), PairFacts(1.0, 2.0, -1.5)]


def setup_of(o: Objective) -> oracle.Setup:
    """The oracle's words for an objective; a field that is missing here fails the last test."""
    tau = o.link_arguments.get("tau_min", 0.1), o.link_arguments.get("tau_max", 4.0)
    return oracle.Setup(
        normalize=o.length_normalize, margin=o.margin, k=o.top_k, constraint=o.constraint,
        stop_gradient=o.stop_gradient, beta=o.beta, alpha=o.alpha, gamma=o.gamma,
        feature_scale=o.feature_scale, log_odds=o.log_odds, link=o.link, tau=tau,
        rho=o.link_arguments.get("rho", 0.1), share=o.link_arguments.get("share", 0.4),
        preference=o.preference_weight, nll=o.nll_weight, smoothing=o.label_smoothing,
        robust=o.robust_smoothing, score_margin=o.score_margin, wpo=o.wpo,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("preset", "changes", "activation"), CASES)
def test_losses_and_every_gradient_equal_the_oracle(
    folders, truth, family, preset, changes, activation
):
    objective = Objective(**{**PRESETS[preset], "top_k": K, **changes})
    sae = random_sae(activation, 32, Site(1))
    saes = [sae] if objective.pooled else []
    pairs = random_pairs([(9, 5, 8), (4, 7, 3), (1, 4, 4)])
    if changes in TERMS.values():  # rows that say more than their texts
        pairs = [dataclasses.replace(p, facts=f) for p, f in zip(pairs, FACTS, strict=True)]
    scorer, values = scorer_with_lora(folders[family], objective, saes)
    (losses, u, chosen, rejected), measures, grads = losses_and_grads(scorer, values, pairs)

    sides, lora = truth(family, activation if saes else None, saes, values, pairs)
    want, want_grads = oracle.of_scored(sides, lora, pairs, setup_of(objective), taps=saes)

    def column(name):
        return np.array([row[name] for row in want])

    np.testing.assert_allclose(u, column("u"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses, column("loss"), rtol=1e-4)
    np.testing.assert_allclose(chosen, column("rewards/chosen"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rejected, column("rewards/rejected"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(measures.logps)[0], column("logps/chosen"), rtol=1e-4)
    if objective.constraint == "kl":
        np.testing.assert_allclose(np.array(measures.kl)[1], column("kl/rejected"), rtol=1e-3)
    assert set(grads) == set(want_grads)
    for name, got in grads.items():
        size = np.abs(want_grads[name]).max()
        np.testing.assert_allclose(got, want_grads[name], rtol=1e-3, atol=1e-3 * size, err_msg=name)
    assert max(np.abs(g).max() for g in grads.values()) > 1e-5


@pytest.mark.parametrize("scale", ["raw", "reference"])
def test_two_saes_of_different_scale_count_as_the_oracle_says(folders, scale):
    """Scaled, each D is over its own SAE's scale before the mean is taken."""
    small, large = random_sae("topk", 32, Site(1)), random_sae("relu", 32, Site(2), seed=4)
    large = dataclasses.replace(large, act_scale=np.full(large.n_features, 30.0, np.float32))
    objective = Objective(top_k=K, feature_scale=scale)
    pairs = random_pairs([(9, 5, 8), (4, 7, 3)])
    scorer, values = scorer_with_lora(folders["llama"], objective, [small, large])
    (_, u, *_), _, grads = losses_and_grads(scorer, values, pairs)
    model = oracle.load_oracle(folders["llama"])
    lora = oracle.attach_lora(model, values, scale=2.0)
    setup = oracle.Setup(k=K, feature_scale=scale)
    want, want_grads = oracle.loss_and_grads(model, lora, pairs, setup, taps=[small, large])
    np.testing.assert_allclose(u, [row["u"] for row in want], rtol=1e-4, atol=1e-5)
    for name, got in grads.items():
        size = np.abs(want_grads[name]).max()
        np.testing.assert_allclose(got, want_grads[name], rtol=1e-3, atol=1e-3 * size, err_msg=name)


def test_oracle_rows_sanity_different_lora_gives_different_losses(folders):
    """Guards the comparison itself: were the LoRA values not in force, u would be 0."""
    scorer, values = scorer_with_lora(
        folders["llama"], Objective(top_k=K), [random_sae("topk", 32, Site(1))]
    )
    pairs = random_pairs([(5, 6, 4)])
    (_, u, *_), _, _ = losses_and_grads(scorer, values, pairs)
    assert abs(float(u[0])) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_step_zero_is_the_closed_form_and_has_a_gradient(folders, family, preset):
    """policy = reference: u = 0 (or -gamma with the constant margin) and D = 0.

    The first loss is what the self-check of a run expects, from the reference's scores alone.
    """
    objective = Objective(**{**PRESETS[preset], "top_k": K})
    saes = [random_sae("topk", 32, Site(1))] if objective.pooled else []
    pairs = random_pairs([(9, 5, 8), (4, 7, 3)])
    scorer, _ = scorer_with_lora(folders[family], objective, saes)
    fresh = {k: np.array(v) for k, v in adapters.parameters(scorer.policy.model)}
    (losses, u, *_), measures, grads = losses_and_grads(scorer, fresh, pairs)
    refs = scorer.reader.scores(pairs)
    want, want_u = guard.closed_form(refs, {}, objective)
    np.testing.assert_allclose(losses, FIRST.get(preset, want), rtol=1e-5)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_allclose(u, want_u, rtol=1e-5, atol=1e-5)
    if objective.margin == "reference":
        np.testing.assert_allclose(u, 0, atol=1e-5)
    elif not objective.log_odds:
        logps, lengths = np.array(measures.logps), np.array(measures.lengths)
        per = lengths if objective.length_normalize else 1
        gap = (logps / per)[0] - (logps / per)[1]
        np.testing.assert_allclose(u, objective.beta * gap - objective.gamma, rtol=1e-5)
    if measures.distances is not None:
        np.testing.assert_allclose(np.array(measures.distances), 0, atol=1e-10)
    assert max(np.abs(g).max() for k, g in grads.items() if k.endswith("lora_b")) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("preset", ["fpo", "tdpo2"])
def test_prompt_once_equals_whole_sequences(folders, family, grad_checkpoint, preset):
    """Loss and all gradients, to float32 rounding; gradient checkpointing changes nothing."""
    objective = Objective(**{**PRESETS[preset], "top_k": K})
    saes = [random_sae("jumprelu", 32, Site(1))] if objective.pooled else []
    pairs = random_pairs([(12, 5, 8), (3, 7, 7), (1, 4, 2)])
    results = []
    for share in (True, False):
        scorer, values = scorer_with_lora(
            folders[family], objective, saes, share_prompt=share,
            grad_checkpoint=grad_checkpoint and share,
        )  # fmt: skip
        assert scorer.policy.shares_prompt is share
        results.append(losses_and_grads(scorer, values, pairs))
    (once, _, grads), (plain, _, plain_grads) = results
    np.testing.assert_allclose(once[0], plain[0], rtol=1e-5)
    for name, got in grads.items():
        size = np.abs(plain_grads[name]).max()
        np.testing.assert_allclose(got, plain_grads[name], atol=1e-5 * size, err_msg=name)


def test_objective_fields_are_all_compared_here():
    """A new field of Objective must be added to `setup_of`.

    feature_weights has its own comparison, in test_feature_weights.py.
    """
    names = {f.name for f in dataclasses.fields(Objective)}
    source = inspect.getsource(setup_of)
    assert {n for n in names if f"o.{n}" not in source} == {
        "feature_weights", "link_parameters",
        "target_drift", "target_kl",  # they set alpha and feature_scale: test_drift.py
    }  # fmt: skip
    assert "o.link_arguments" in source  # what link_parameters fill


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_eight_pairs_agree_with_the_oracle_in_every_number(folders, family):
    """Log-probs, pooled features, D, u and loss, to 1e-4 relative."""
    sizes = [
        (9, 5, 8),
        (4, 7, 3),
        (1, 4, 4),
        (12, 2, 9),
        (3, 3, 1),
        (6, 11, 5),
        (2, 8, 8),
        (7, 1, 6),
    ]
    pairs, sae = random_pairs(sizes, seed=5), random_sae("jumprelu", 32, Site(1))
    scorer, values = scorer_with_lora(folders[family], Objective(top_k=K), [sae])
    refs = scorer.reader.scores(pairs)
    (losses, u, _, _), measures, _ = losses_and_grads(scorer, values, pairs)
    model = oracle.load_oracle(folders[family])
    lora = oracle.attach_lora(model, values, scale=2.0)
    want, _ = oracle.loss_and_grads(model, lora, pairs, oracle.Setup(k=K), taps=[sae])
    for i, side in enumerate(("chosen", "rejected")):
        for name, got in (("logps", measures.logps), ("features", measures.distances)):
            np.testing.assert_allclose(
                np.array(got)[i], [row[f"{name}/{side}"] for row in want], rtol=1e-4, atol=1e-7
            )
    np.testing.assert_allclose(u, [row["u"] for row in want], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses, [row["loss"] for row in want], rtol=1e-4)
    with oracle.adapters_off(model):
        for pair, ref in zip(pairs, refs, strict=True):
            for response, score in zip(pair.responses, ref, strict=True):
                truth = oracle.score_response(model, pair.prompt, response, [sae])
                pooled = truth.pooled[0].detach().numpy()
                np.testing.assert_allclose(score.logps, float(truth.logps), rtol=1e-4)
                np.testing.assert_allclose(
                    score.features[0].to_dense(sae.n_features), pooled, atol=1e-4 * pooled.max()
                )


INVARIANT = [*((name, {}) for name in PRESETS), *(("fpo", term) for term in TERMS.values())]


@pytest.mark.parametrize(("preset", "changes"), INVARIANT)
def test_a_loss_does_not_depend_on_its_batch_its_padding_or_its_order(folders, preset, changes):
    """Each pair alone has no padding; together they have, and in another order other padding."""
    objective = Objective(**{**PRESETS[preset], "top_k": K, **changes})
    saes = [random_sae("topk", 32, Site(1))] if objective.pooled else []
    pairs = random_pairs([(9, 5, 8), (4, 7, 3), (1, 4, 4)])
    pairs = [dataclasses.replace(p, facts=f) for p, f in zip(pairs, FACTS, strict=True)]
    scorer, values = scorer_with_lora(folders["llama"], objective, saes)
    refs = scorer.reader.scores(pairs)
    adapters.update(scorer.policy.model, {k: mx.array(v) for k, v in values.items()})

    def losses(order):
        got, _ = scorer.losses([pairs[i] for i in order], [refs[i] for i in order], grad=False)
        return np.array(got.losses)

    together = losses([0, 1, 2])
    np.testing.assert_allclose(losses([2, 0, 1]), together[[2, 0, 1]], rtol=2e-5, atol=1e-6)
    alone = np.concatenate([losses([i]) for i in range(3)])
    np.testing.assert_allclose(alone, together, rtol=2e-5, atol=1e-6)
