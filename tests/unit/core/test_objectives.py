"""The family by hand: links, terms, presets; the paper's own way to the minimum of ada-dpo."""

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from fpo_mlx.config import PRESETS, Objective, load_config  # noqa: E402
from fpo_mlx.core import links  # noqa: E402
from fpo_mlx.core.links import LINKS  # noqa: E402
from fpo_mlx.core.objectives import (  # noqa: E402
    Seen,
    how_sure,
    log_odds,
    policy_weights,
    preference_losses,
)
from fpo_mlx.errors import ConfigError  # noqa: E402

# One pair: policy -6 / -9 nats, reference -8 / -7, lengths 2 / 3, C = 0.5 / 2; beta 1, alpha 0.5
# but for tdpo1 (alpha 1), gamma 0.25 where the margin is constant.
# sums: (-6 + 8) - (-9 + 7) = 4; means: (-6 + 8) / 2 - (-9 + 7) / 3 = 5/3; bare means: -3 + 3 = 0
U = {
    "dpo": 4.0, "hinge": 4.0, "apo-zero": 4.0, "apo-down": 4.0, "ada-dpo": 4.0, "sail-ddp": 4.0,
    "simpo": -0.25,
    "simpo-kl": -0.25 - 0.75,
    "tdpo1": 4.0 - 1.5,
    "tdpo2": 4.0 - 0.75,
    "fpo": 5 / 3 - 0.75,
    "ipo": 5 / 3,
    "cpo": 3.0 - 0.25,
    "orpo": -0.25, "asft": -0.25, "sft": -0.25,  # both responses at -3 nats a token
}  # fmt: skip


def softplus(x):
    return math.log1p(math.exp(x))


ODDS = -3 - math.log(1 - math.exp(-3))  # log-odds of exp(-3)
LOSS = {  # where it is not -log sigmoid(u)
    "ipo": (5 / 3 - 1 / 2) ** 2,
    "hinge": 0.0,
    "apo-zero": 2 / (1 + math.e**2),  # 1 - sigmoid(2) + sigmoid(-2)
    "apo-down": 1 / (1 + math.e**-2) + 1 / (1 + math.e**4),
    "ada-dpo": 4 * softplus(-1) + 4 * (0.1 - math.log(2)),  # tau at its most: 4 / 0.943 > 4
    "sail-ddp": softplus(-4) - 0.04 * softplus(-4) ** 2,
    "cpo": softplus(-2.75) + 3,
    "orpo": 0.1 * softplus(0.25) + 3,
    "asft": 0.1 * (3 + softplus(ODDS + 0.25)) + 3,  # -log sigmoid(log-odds of p) = -log p
    "sft": 3.0,
}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_preference_losses_by_hand(preset):
    o = Objective(**{**PRESETS[preset], "beta": 1.0, "gamma": 0.25})
    penalties = None if o.constraint == "none" else mx.array([[0.5], [2.0]])
    logps, ref_logps = mx.array([[-6.0], [-9.0]]), mx.array([[-8.0], [-7.0]])
    got = preference_losses(Seen(logps, ref_logps, mx.array([[2.0], [3.0]]), penalties), o)
    u = U[preset]
    np.testing.assert_allclose(got.u.item(), u, rtol=1e-6)
    np.testing.assert_allclose(got.losses.item(), LOSS.get(preset, softplus(-u)), rtol=1e-5)
    rewards = (1.0, -2 / 3) if o.length_normalize else (2.0, -2.0)
    np.testing.assert_allclose(
        (got.chosen_rewards.item(), got.rejected_rewards.item()), rewards, rtol=1e-6
    )


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_stop_gradient_holds_the_chosen_penalty_by_hand(stop_gradient):
    """dL/dC = -sigmoid(-u) du/dC, du/dC_l = -alpha beta, du/dC_w = +alpha beta or 0; u = 0 here."""

    def loss(penalties):
        zero, one = mx.zeros((2, 1)), mx.ones((2, 1))
        o = Objective(beta=0.5, alpha=0.4, stop_gradient=stop_gradient)
        return preference_losses(Seen(zero, zero, one, penalties), o).losses.sum()

    slope = mx.grad(loss)(mx.array([[1.0], [1.0]]))
    np.testing.assert_allclose(
        np.array(slope)[:, 0], [0.0 if stop_gradient else -0.1, 0.1], atol=1e-7
    )


def test_far_margins_give_finite_losses_and_slopes():
    def loss(x):
        seen = Seen(mx.stack([x, -x]), mx.zeros((2, 2)), mx.ones((2, 2)))
        return preference_losses(seen, Objective(beta=1.0, constraint="none")).losses.sum()

    value, slope = mx.value_and_grad(loss)(mx.array([500.0, -500.0]))
    assert value.item() == 1000.0
    assert slope.tolist() == [0.0, -2.0]


# Links --------------------------------------------------------------------------------------------


def link(name, chosen, rejected, beta=1.0):
    o = Objective(link=name)
    return LINKS[name](mx.array(chosen), mx.array(rejected), beta, **o.link_arguments).item()


def test_every_link_can_be_chosen():
    assert get_args(get_type_hints(Objective)["link"]) == tuple(LINKS)


@pytest.mark.parametrize(
    ("name", "chosen", "rejected", "beta", "want"),
    [
        ("sigmoid", math.log(3), 0.0, 1.0, math.log(4 / 3)),
        ("ipo", 0.3, 0.1, 0.1, ((0.2 - 0.5) / 0.1) ** 2),  # (2 - 5)^2 = 9
        ("hinge", 0.25, 0.75, 1.0, 1.5),
        ("hinge", 2.0, 0.5, 1.0, 0.0),
        ("sail", 0.0, 0.0, 1.0, math.log(2) - 0.04 * math.log(2) ** 2),
        ("apo-zero", math.log(3), -math.log(3), 1.0, 1 / 4 + 1 / 4),
        ("apo-down", math.log(3), math.log(3), 1.0, 3 / 4 + 1 / 2),
        ("each", math.log(3), math.log(3), 1.0, math.log(4 / 3) + math.log(4)),
        ("ada", 0.0, 0.0, 1.0, 0.01),  # tau_min rho
    ],
)
def test_each_link_by_hand(name, chosen, rejected, beta, want):
    assert link(name, chosen, rejected, beta) == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_the_scale_of_ada_solves_its_equation():
    """KL(Bern(p) || Bern(1/2)) = ln 2 - H(p); 0.943 for rho 0.1."""
    for rho in (0.01, 0.1, 0.5):
        p = 1 / (1 + math.exp(-links.scale_of(rho)))
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        assert kl == pytest.approx(rho, rel=1e-9)
    assert links.scale_of(0.1) == pytest.approx(0.943, abs=5e-4)


def newton(u, low, high, rho, steps=60):
    """The minimum over tau as the paper takes it: Newton steps, projected on [low, high].

    Halved while they do not lower the value; from tau = 1. Returns: tau and the value there.
    """

    def value(tau):
        return tau * np.logaddexp(0, -u / tau) + (rho - math.log(2)) * tau

    tau = min(max(1.0, low), high)
    for _ in range(steps):
        s = u / tau
        p = 1 / (1 + math.exp(-s))
        slope = np.logaddexp(0, -s) + s * (1 - p) + rho - math.log(2)
        bend = s * s * p * (1 - p) / tau
        step = slope / max(bend, 1e-12)
        for _ in range(60):
            there = min(max(tau - step, low), high)
            if value(there) <= value(tau):
                break
            step /= 2
        tau = there if value(there) <= value(tau) else tau
    return tau, value(tau)


def test_the_closed_form_of_ada_is_where_newton_ends_for_a_thousand_u():
    u = np.random.default_rng(0).normal(scale=3.0, size=1000)
    got = links._ada(
        mx.array(u.astype(np.float32)), mx.zeros(1000), 1.0, tau_min=0.1, tau_max=4.0, rho=0.1
    )
    found = [newton(float(np.float32(x)), 0.1, 4.0, 0.1) for x in u]
    np.testing.assert_allclose(np.array(got), [v for _, v in found], rtol=1e-5, atol=1e-6)
    closed = np.clip(np.abs(u) / links.scale_of(0.1), 0.1, 4.0)
    np.testing.assert_allclose([tau for tau, _ in found], closed, rtol=1e-3)
    assert 100 < sum((closed > 0.1) & (closed < 4.0)) < 1000  # inside, and at both bounds


def test_the_slope_of_ada_is_that_of_its_value():
    """tau carries no gradient, and need not: at its minimum the value does not move with it."""
    u, step = np.linspace(-6, 6, 49) + 0.01, 1e-5
    ends = [[newton(x + sign * step, 0.1, 4.0, 0.1)[1] for x in u] for sign in (1, -1)]

    def total(x):
        return links._ada(x, mx.zeros(49), 1.0, tau_min=0.1, tau_max=4.0, rho=0.1).sum()

    slope = mx.grad(total)(mx.array(u.astype(np.float32)))
    np.testing.assert_allclose(np.array(slope), np.subtract(*ends) / (2 * step), atol=1e-4)


# Terms --------------------------------------------------------------------------------------------

ONE = Seen(mx.array([[-6.0], [-9.0]]), mx.array([[-8.0], [-7.0]]), mx.array([[2.0], [3.0]]))
DPO = Objective(**{**PRESETS["dpo"], "beta": 0.5})  # u = 0.5 (2 + 2) = 2


def loss(o=DPO, **facts):
    seen = ONE._replace(**{name: mx.array(value) for name, value in facts.items()})
    return preference_losses(seen, o).losses.item()


@pytest.mark.parametrize(
    ("changes", "facts", "want"),
    [
        ({}, {}, softplus(-2)),
        ({"nll_weight": 0.3}, {}, softplus(-2) + 0.3 * 3),
        ({"preference_weight": 0.5}, {}, 0.5 * softplus(-2)),
        ({"label_smoothing": 0.2}, {}, 0.8 * softplus(-2) + 0.2 * softplus(2)),
        (
            {"label_smoothing": 0.2, "robust_smoothing": True}, {},
            (0.8 * softplus(-2) - 0.2 * softplus(2)) / 0.6,
        ),
        ({}, {"agreement": [0.7]}, 0.7 * softplus(-2) + 0.3 * softplus(2)),
        # right in 0.7 of the cases and then turned round in a tenth: 0.7 * 0.9 + 0.3 * 0.1
        ({"label_smoothing": 0.1}, {"agreement": [0.7]}, 0.66 * softplus(-2) + 0.34 * softplus(2)),
        ({"nll_weight": 1.0}, {"weights": [0.5]}, 0.5 * (softplus(-2) + 3)),
        ({"score_margin": 0.25}, {"score_gaps": [4.0]}, softplus(-1)),
        ({}, {"score_gaps": [4.0]}, softplus(-2)),
        # exp((-6 + 4) / 2 + (-9 + 7.5) / 3) = exp(-1.5); the likelihood is not weighed
        (
            {"nll_weight": 1.0}, {"log_collisions": [[-4.0], [-7.5]]},
            math.exp(-1.5) * softplus(-2) + 3,
        ),
        ({}, {"log_collisions": [[-7.0], [-9.5]]}, softplus(-2)),  # exp(1 / 2 + 1 / 6), at most 1
        ({"link": "hinge", "label_smoothing": 0.25}, {}, 0.75 * 0 + 0.25 * 3),
    ],
)  # fmt: skip
def test_each_term_by_hand(changes, facts, want):
    assert loss(replace(DPO, **changes), **facts) == pytest.approx(want, rel=1e-5)


def test_robust_smoothing_undoes_flips_in_the_mean():
    """E over flips of rate e of the robust loss is the plain loss of the true label."""
    o = replace(DPO, label_smoothing=0.2, robust_smoothing=True)
    turned = ONE._replace(logps=ONE.logps[::-1], ref_logps=ONE.ref_logps[::-1])
    as_is, flipped = (preference_losses(seen, o).losses.item() for seen in (ONE, turned))
    assert 0.8 * as_is + 0.2 * flipped == pytest.approx(loss(), rel=1e-5)


@pytest.mark.parametrize("name", list(LINKS))
def test_an_agreement_of_nought_is_the_other_label(name):
    o = replace(DPO, link=name)
    turned = ONE._replace(logps=ONE.logps[::-1], ref_logps=ONE.ref_logps[::-1])
    assert loss(o, agreement=[0.0]) == pytest.approx(
        preference_losses(turned, o).losses.item(), rel=1e-5, abs=1e-7
    )


def test_no_doubt_costs_no_second_link():
    assert how_sure(None, DPO) is None
    assert how_sure(None, replace(DPO, label_smoothing=0.1)) == pytest.approx(0.9)


def test_the_weight_of_wpo_is_a_constant():
    slope = mx.grad(lambda x: policy_weights(x, ONE.log_collisions or ONE.logps, ONE.lengths).sum())
    assert not np.array(slope(ONE.logps)).any()


def test_log_odds_are_finite_with_slopes_up_to_certainty():
    """log p - log(1 - p); at p = 1 it is held at 1 - 1e-7."""
    x = mx.array([-50.0, math.log(0.75), -1e-12, 0.0])
    got, slope = log_odds(x), mx.grad(lambda x: log_odds(x).sum())(x)
    np.testing.assert_allclose(
        np.array(got), [-50.0, math.log(3), -math.log(1e-7), -math.log(1e-7)], rtol=1e-5
    )
    np.testing.assert_allclose(np.array(slope)[:2], [1.0, 4.0], rtol=1e-5)  # 1 / (1 - p)
    assert np.isfinite(np.array(slope)).all()


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"label_smoothing": 0.5}, "--label-smoothing 0.5: wanted 0 or more, less than 0.5"),
        ({"nll_weight": -1}, "--nll-weight -1: wanted a finite number, 0 or more"),
        ({"objective": "sft", "nll_weight": 0}, "are both 0: nothing would be trained"),
        ({"link_parameters": {"rho": 1}}, "unknown rho; --link sigmoid takes none"),
        ({"link": "ada", "link_parameters": {"tau": 1}}, "unknown tau; wanted tau_min"),
        ({"link": "ada", "link_parameters": {"rho": 0.7}}, "rho below ln 2"),
        ({"link": "ada", "link_parameters": {"tau_min": 5}}, "wanted tau_min <= tau_max"),
        ({"link": "sail", "link_parameters": {"share": 2}}, "a share of 1 at most"),
        ({"link": "sail", "link_parameters": {"rho": "much"}}, "wanted numbers above 0"),
    ],
)
def test_what_an_objective_cannot_be_is_refused(settings, text):
    with pytest.raises(ConfigError) as error:
        load_config(settings)
    assert text in str(error.value)
