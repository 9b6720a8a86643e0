"""The oracle against numbers worked out by hand. Its models: test_oracle_model.py."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import (
    Scored,
    Setup,
    distance,
    encode,
    objective,
    preset,
    score_response,
    sequential_kl,
    top_indices,
)

from fpo_mlx.records import SaeWeights, Site


def f32(values: list) -> np.ndarray:
    return np.array(values, np.float32)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The SAE ------------------------------------------------------------------------------------------
# x = (1, 2), b_in = (0, 1) -> (1, 1). Columns of w_enc (1,2) (-1,0) (2,-1) (0,-3):
# raw = (3, -1, 1, -3), b_enc = (0, 2, -3, 1): pre = (3, 1, -2, -2).

SAE = SaeWeights(
    activation="relu",
    w_enc=f32([[1, -1, 2, 0], [2, 0, -1, -3]]),
    b_enc=f32([0, 2, -3, 1]),
    b_in=f32([0, 1]),
)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, (3, 1, 0, 0)),
        ({"act_scale": f32([2, 3, 1, 1])}, (6, 3, 0, 0)),
        # strictly above its threshold; a negative threshold never lets a negative through
        ({"activation": "jumprelu", "threshold": f32([2, 1, -9, -9])}, (3, 0, 0, 0)),
        # raw * 2 + b_enc = (6, 0, -1, -5), raw + gate_bias = (-1, 0, 2, 1)
        (
            {
                "activation": "gated",
                "gate_scale": f32([2, 2, 2, 2]),
                "gate_bias": f32([-4, 1, 1, 4]),
            },
            (0, 0, 0, 0),
        ),
        # raw * 5 + b_enc = (15, -3, 2, -14), gates (2, -2, 0.5, 1)
        (
            {
                "activation": "gated",
                "gate_scale": f32([5, 5, 5, 5]),
                "gate_bias": f32([-1, -1, -0.5, 4]),
            },
            (15, 0, 2, 0),
        ),
        ({"activation": "identity"}, (3, 1, -2, -2)),
        ({"activation": "topk", "k": 1}, (3, 0, 0, 0)),
        ({"activation": "topk", "k": 3}, (3, 1, 0, 0)),
        ({"activation": "abstopk", "k": 1}, (3, 0, 0, 0)),
        ({"activation": "abstopk", "k": 2, "b_enc": f32([0, 2, -3, -1])}, (3, 0, 0, -4)),
        ({"activation": "groupmax", "k": 2}, (3, 0, 0, 0)),
        ({"activation": "groupmax", "k": 1, "b_enc": f32([-9, 2, 0, 1])}, (0, 1, 0, 0)),
        ({"activation": "groupmax", "k": 2, "b_enc": f32([0, 2, 1, 5])}, (3, 0, 2, 0)),
    ],
)
def test_every_activation_by_hand(changes: dict, wanted: tuple[float, ...]):
    got = encode(replace(SAE, **changes), vector(1, 2)[None])
    np.testing.assert_allclose(got[0], wanted, atol=1e-12)


def test_normalised_inputs_by_hand():
    identity = replace(SAE, w_enc=np.eye(2, dtype=np.float32), b_enc=np.zeros(2), b_in=None)
    # (3, 4): norm 5, sqrt(D) = sqrt(2)
    got = encode(replace(identity, normalize="constant_norm"), vector(3, 4)[None])
    np.testing.assert_allclose(got[0], [3 * math.sqrt(2) / 5, 4 * math.sqrt(2) / 5])
    # (1, 3): mean 2, std with n - 1 is sqrt(2)
    got = encode(replace(identity, normalize="layer_norm"), vector(1, 3)[None])
    np.testing.assert_allclose(got[0], [0, 1 / (math.sqrt(2) + 1e-5)])


# D and KL -----------------------------------------------------------------------------------------
# policy (3, 0, 1, 0, 0), reference (1, 2, 0, 0, 5e-1): squares of the differences (4, 4, 1, 0, .25)

POLICY, REF = vector(3, 0, 1, 0, 0), vector(1, 2, 0, 0, 0.5)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"k": 1}, 8.0),  # I = {0} and {1}
        ({"k": 2}, 9 / 2),  # I = {0, 2} and {1, 0}
        ({"k": 3}, 9.25 / 3),  # the policy has two active features only
        ({"k": 50}, 9.25 / 50),  # 1/k is the constant k
        ({"k": 1, "named": (2,)}, 9.0),
        ({"k": 1, "named": (2, 0)}, 9.0),  # named and chosen counts once
        ({"k": 1, "named": (3,)}, 8.0),
        ({"k": 1, "weights": {0: 0.5, 1: 2.0, 2: 100.0}}, 10.0),
        ({"k": 1, "feature_scale": "reference"}, 8 / 4),  # reference's top 1: 2 squared
        ({"k": 2, "feature_scale": "reference"}, 4.5 / 2.5),  # (4 + 1) / 2
        ({"k": 2, "feature_scale": "reference", "weights": {0: 0.5}}, 3.5 / 2.5),
    ],
)
def test_the_distance_by_hand(changes: dict, wanted: float):
    assert float(distance(POLICY, REF, Setup(**changes))) == pytest.approx(wanted, rel=1e-12)


def test_the_top_k_goes_by_value_or_by_magnitude():
    values = vector(-3, 1, 2, 0)
    assert top_indices(values, 1, by_magnitude=False) == {2}
    assert top_indices(values, 1, by_magnitude=True) == {0}
    assert top_indices(values, 4, by_magnitude=True) == {0, 1, 2}  # never a zero
    # I = {0} and {1}: (-3 - 0)^2 + (1 - 2)^2
    ref = vector(0, 2, 0, 0)
    assert float(distance(values, ref, Setup(k=1), by_magnitude=True)) == pytest.approx(10)


def test_the_sequential_kl_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = ln(2)/2 + ln(2/3)/2 = ln(4/3)/2, and nothing where they agree
    ref = torch.log(torch.stack([vector(0.5, 0.5), vector(0.1, 0.9)]))
    policy = torch.log(torch.stack([vector(0.25, 0.75), vector(0.1, 0.9)]))
    assert float(sequential_kl(ref, policy)) == pytest.approx(math.log(4 / 3) / 2, rel=1e-12)


# The objective ------------------------------------------------------------------------------------
# chosen: 2 tokens, policy -1 -2 = -3, reference -5. rejected: 4 tokens, policy -12, reference -8.
# sums: policy difference 9, reference 3. means: -1.5 + 3 = 1.5 and -2.5 + 2 = -0.5.
# D with k = 1: chosen (2 - 1)^2 = 1, rejected (5 - 2)^2 = 9.
# KL: each position of the chosen is ln(4/3)/2 off, of the rejected too: ln(4/3) and 2 ln(4/3).

C = math.log(4 / 3)


def scored(token_logps: list[float], probs: list[float], feature: float) -> Scored:
    log_probs = torch.log(vector(*probs)).expand(len(token_logps), 2)
    return Scored(vector(*token_logps), log_probs, (vector(feature, 0),))


POLICY_PAIR = (
    scored([-1, -2], [0.25, 0.75], 2.0),
    scored([-3, -3, -3, -3], [0.25, 0.75], 5.0),
)
REF_PAIR = (scored([-2, -3], [0.5, 0.5], 1.0), scored([-2, -2, -2, -2], [0.5, 0.5], 2.0))


@pytest.mark.parametrize(
    ("name", "changes", "u"),
    [
        ("dpo", {}, 0.1 * (9 - 3)),
        ("dpo", {"beta": 0.5}, 0.5 * (9 - 3)),
        ("simpo", {}, 2 * 1.5 - 1),
        ("simpo", {"gamma": 0.25, "beta": 1.0}, 1.5 - 0.25),
        ("simpo-kl", {}, 2 * 1.5 - 1 - 0.5 * 2 * (2 * C - C)),
        ("tdpo1", {}, 0.1 * (9 - 3) - 0.1 * (2 * C - C)),
        ("tdpo2", {}, 0.1 * (9 - 3) - 0.5 * 0.1 * (2 * C - C)),
        ("fpo", {}, 0.1 * (1.5 + 0.5) - 0.5 * 0.1 * (9 - 1)),
        ("fpo", {"alpha": 2.0, "beta": 0.3}, 0.3 * (1.5 + 0.5) - 2 * 0.3 * (9 - 1)),
        ("fpo", {"stop_gradient": False}, 0.1 * (1.5 + 0.5) - 0.5 * 0.1 * (9 - 1)),
        ("fpo", {"normalize": False}, 0.1 * (9 - 3) - 0.5 * 0.1 * (9 - 1)),
        ("fpo", {"margin": "constant", "gamma": 0.2}, 0.1 * 1.5 - 0.2 - 0.5 * 0.1 * (9 - 1)),
        ("fpo", {"constraint": "none"}, 0.1 * (1.5 + 0.5)),
        ("fpo", {"constraint": "kl"}, 0.1 * (1.5 + 0.5) - 0.5 * 0.1 * (2 * C - C)),
        ("fpo", {"constraint": "activations"}, 0.1 * (1.5 + 0.5) - 0.5 * 0.1 * (9 - 1)),
        # divided by the reference's own squares, 1 and 4
        ("fpo", {"feature_scale": "reference"}, 0.1 * (1.5 + 0.5) - 0.05 * (9 / 4 - 1)),
    ],
)
def test_u_and_loss_of_every_objective_by_hand(name: str, changes: dict, u: float):
    parts = objective(preset(name, **({"k": 1} | changes)), POLICY_PAIR, REF_PAIR)
    assert float(parts["u"]) == pytest.approx(u, rel=1e-12)
    assert float(parts["loss"]) == pytest.approx(math.log(1 + math.exp(-u)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "beta", "chosen", "rejected"),
    [("dpo", 0.1, 2.0, -4.0), ("fpo", 0.1, 1.0, -1.0), ("simpo", 2.0, 1.0, -1.0)],
)
def test_rewards_are_the_ratio_to_the_reference(name, beta, chosen, rejected):
    parts = objective(preset(name, k=1), POLICY_PAIR, REF_PAIR)
    assert float(parts["rewards/chosen"]) == pytest.approx(beta * chosen)
    assert float(parts["rewards/rejected"]) == pytest.approx(beta * rejected)


def test_the_distance_is_averaged_over_several_saes():
    def with_a_second(pair: tuple[Scored, Scored]) -> tuple[Scored, Scored]:
        chosen, rejected = (replace(one, pooled=(*one.pooled, vector(0, 3))) for one in pair)
        return chosen, rejected

    # the second SAE saw no change: its D is 0
    pairs = with_a_second(POLICY_PAIR), with_a_second(REF_PAIR)
    parts = objective(Setup(k=1), *pairs, (False, False))
    assert float(parts["features/rejected"]) == pytest.approx(9 / 2)


@pytest.mark.parametrize(("stop_gradient", "wanted"), [(True, 0.0), (False, 2 * (2 - 1))])
def test_the_stop_gradient_holds_the_chosen_distance(stop_gradient: bool, wanted: float):
    pooled = [vector(2, 0).requires_grad_(), vector(5, 0).requires_grad_()]
    chosen, rejected = (replace(s, pooled=(p,)) for s, p in zip(POLICY_PAIR, pooled, strict=True))
    parts = objective(Setup(k=1, stop_gradient=stop_gradient), (chosen, rejected), REF_PAIR)
    gradient = torch.autograd.grad(parts["u"], pooled, materialize_grads=True, allow_unused=True)
    # du/dD_l = -alpha beta, du/dD_w = alpha beta; dD/dpooled = 2 (difference)
    assert float(gradient[0][0]) == pytest.approx(0.05 * wanted)
    assert float(gradient[1][0]) == pytest.approx(-0.05 * 2 * (5 - 2))


# Scoring: a bigram model whose activation is the one-hot token ------------------------------------

BIGRAM = np.random.default_rng(0).dirichlet(np.ones(4), 4)  # row: token, column: next token


class Bigram(torch.nn.Module):
    """Next-token probabilities BIGRAM[token]; the stream after its only block is one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="bigram")
        self.model = torch.nn.Module()
        self.block = torch.nn.Identity()
        self.model.layers = torch.nn.ModuleList([self.block])

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        h = self.block(torch.nn.functional.one_hot(tokens, 4).double())
        return SimpleNamespace(logits=3.0 + h @ torch.tensor(BIGRAM).log())


def test_response_positions_run_from_the_last_prompt_token_to_the_last_but_one():
    got = score_response(Bigram(), [0, 1], [2, 3, 3], [Site(0)])
    wanted = np.log([BIGRAM[1, 2], BIGRAM[2, 3], BIGRAM[3, 3]])
    np.testing.assert_allclose(got.token_logps, wanted, rtol=1e-12)
    assert float(got.logps) == pytest.approx(wanted.sum())
    assert got.tokens == 3
    np.testing.assert_allclose(got.pooled[0], [0, 1 / 3, 1 / 3, 1 / 3])  # tokens 1, 2, 3
    np.testing.assert_allclose(got.log_probs.exp(), BIGRAM[[1, 2, 3]])


def test_features_are_pooled_after_the_activation():
    # pre = one-hot @ (2, -4, 2, 2): rectified (2, 0, 2), mean 4/3; rectified mean would be 0
    sae = SaeWeights("relu", f32([[2], [-4], [2], [2]]), np.zeros(1), site=Site(0))
    got = score_response(Bigram(), [2], [1, 3, 0], [sae])
    assert float(got.pooled[0][0]) == pytest.approx(4 / 3)
