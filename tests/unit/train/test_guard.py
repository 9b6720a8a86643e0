"""What ends a run: reasons by hand, from figures alone."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from fpo_mlx.config import PRESETS, Objective, TrainConfig, load_config
from fpo_mlx.errors import CacheMismatch, ConfigError
from fpo_mlx.pipeline.train import _compare_weights
from fpo_mlx.records import ResponseScore
from fpo_mlx.train import guard

TOKENS = np.array([20, 20])
CONFIG, FPO = TrainConfig(max_margin=50.0, max_logp_drop=5.0), Objective(beta=0.1)


def values(u=(0.0, 0.0), change=(0.0, 0.0), loss=(0.6931, 0.6931)):
    return {
        "u": np.array(u),
        "logps_per_token/chosen_change": np.array(change),
        "loss": np.array(loss),
    }


def test_the_start_is_bound_per_token_and_wider_in_half_precision():
    """Sums of u: 0.4 nats over the longer response's tokens."""
    sums = dataclasses.replace(FPO, length_normalize=False, margin="reference")
    longer = max(side.tokens for ref in REFS for side in ref)
    gap, _ = guard.gaps(first(u=0.4 * sums.beta), REFS, sums)
    assert gap == pytest.approx(0.4 / longer)
    apart = first(u=0.08 * FPO.beta)
    assert guard.first_step(apart, REFS, 1.0, FPO).reason is not None
    assert guard.first_step(apart, REFS, 1.0, FPO, half=True).reason is None


def test_rounding_of_the_first_pass_is_told_where_there_is_any():
    assert guard.noise(first(), REFS, FPO, "bfloat16") is None
    told = guard.noise(first(u=3e-4 * FPO.beta), REFS, FPO, "bfloat16") or ""
    assert "rounding of bfloat16" in told
    assert "0.69315" in told


def test_a_quiet_update_is_let_through():
    assert guard.divergence(values(), TOKENS, 1.0, CONFIG, FPO) is None


@pytest.mark.parametrize(
    ("seen", "grad_norm", "reason"),
    [
        (values(loss=(0.5, np.nan)), 1.0, "not finite"),
        (values(), np.inf, "not finite"),
        (values(u=(0.0, -10.2)), 1.0, "margin is 51 nats a token, over --max-margin 50"),
        (values(change=(1.0, -11.2)), 1.0, "fell 5.1 nats a token"),
    ],
)
def test_each_kind_of_divergence_has_its_reason(seen, grad_norm, reason):
    """|u| / beta is a mean over pairs: 10.2 / 0.1 / 2 = 51; the drop is (11.2 - 1) / 2 = 5.1."""
    found = guard.divergence(seen, TOKENS, grad_norm, CONFIG, FPO)
    assert found is not None
    assert reason in found.what
    assert "--learning-rate" in found.remedy
    scheduled = dataclasses.replace(CONFIG, lr_schedule={"name": "cosine_decay"})
    found = guard.divergence(seen, TOKENS, grad_norm, scheduled, FPO)
    assert found is not None
    assert "the rates of lr_schedule" in found.remedy
    assert "--learning-rate" not in found.remedy  # it does nothing there


@pytest.mark.parametrize(
    ("seen", "changes", "remedy"),
    [
        (values(change=(-6.0, -6.0)), {}, "Give --nll-weight 0.05"),  # beta / 2
        (values(change=(-6.0, -6.0)), {"beta": 2.0}, "Give --nll-weight 1,"),
        (values(change=(-6.0, -6.0)), {"length_normalize": False}, "Give --nll-weight 1,"),
        (values(change=(-6.0, -6.0)), {"link": "ipo"}, "Give --nll-weight, which"),
        (values(change=(-6.0, -6.0)), {"nll_weight": 0.1}, "raise --nll-weight above 0.1"),
        (values(u=(9.0, 9.0)), {"constraint": "none"}, "--constraint features or kl, or take"),
        (values(u=(9.0, 9.0)), {"alpha": 0.2}, "raise --alpha above 0.2, or take --link ipo"),
        (values(loss=(np.nan, 0.0)), {}, "warm it up"),
    ],
)
def test_a_divergence_names_the_remedy_that_fits_it(seen, changes, remedy):
    found = guard.divergence(seen, TOKENS, 1.0, CONFIG, dataclasses.replace(FPO, **changes))
    assert found is not None
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("changes", "grad_norm", "told"),
    [
        ({}, 16.0, True),
        ({}, 0.9, False),  # not clipped
        ({"max_grad_norm": 0}, 16.0, False),
        ({"batch_size": 2}, 16.0, False),  # two pairs keep their weights beside each other
        ({"grad_accumulation_steps": 2}, 16.0, False),
    ],
)
def test_a_clipped_gradient_of_one_pair_is_said_to_forget_the_pairs_weight(
    changes, grad_norm, told
):
    config = TrainConfig(**{"batch_size": 1, **changes})
    note = guard.one_length(grad_norm, config, FPO)
    assert guard.one_length(grad_norm, config, dataclasses.replace(FPO, nll_weight=0.05)) is None
    assert (note is not None) == told
    if note:
        assert "norm 16 is clipped to 1 (--max-grad-norm)" in note


@pytest.mark.parametrize(
    ("tokens", "stopped"),
    [
        ((4,), False),  # 4 x 10 / 16 = 2.5
        ((9,), True),  # 90 / 16 = 5.6
        ((4, 60), False),  # the other one stays: 40 / 64
        ((30, 60), False),  # 300 / 90 = 3.3, each token counts once
        ((60, 4), True),
    ],
)
def test_a_short_answer_that_falls_alone_ends_no_run(tokens, stopped):
    seen = values(change=(-10.0, 0.0)[: len(tokens)])
    found = guard.divergence(seen, np.array(tokens), 1.0, CONFIG, FPO)
    assert (found is not None) == stopped


def test_a_margin_of_sums_is_not_bounded_a_token():
    sums = Objective(beta=0.1, length_normalize=False)
    assert guard.divergence(values(u=(100.0, 100.0)), TOKENS, 1.0, CONFIG, sums) is None


def test_d_past_its_bound_is_a_reason_only_where_one_is_set():
    far = {
        **values(),
        "features/chosen": np.array([1.0, 2.0]),
        "features/rejected": np.array([9.0]),
    }
    assert guard.divergence(far, TOKENS, 1.0, CONFIG, FPO) is None
    bound = TrainConfig(max_feature_distance=8.0)
    found = guard.divergence(far, TOKENS, 1.0, bound, FPO)
    assert found is not None
    assert found.what == (
        "the feature distance D of the rejected responses is 9, over --max-feature-distance 8"
    )
    assert "--alpha" in found.remedy
    assert guard.divergence(values(), TOKENS, 1.0, bound, FPO) is None  # dpo measures no D


# Step 0 -------------------------------------------------------------------------------------------


def refs(*sides):
    """One pair per (log-prob, tokens) of chosen and rejected."""
    return [(ResponseScore(*chosen), ResponseScore(*rejected)) for chosen, rejected in sides]


REFS = refs(((-6.0, 3), (-20.0, 4)))
SIMPO = Objective(beta=2.0, gamma=1.0, margin="constant", constraint="none")


def first(u=0.0, chosen=0.0, rejected=0.0, loss=None):
    return {
        "u": np.array([u]),
        "loss": np.array([math.log1p(math.exp(-u)) if loss is None else loss]),
        "logps_per_token/chosen_change": np.array([chosen]),
        "logps_per_token/rejected_change": np.array([rejected]),
    }


def test_a_reference_margin_starts_at_ln_2():
    assert first()["loss"][0] == pytest.approx(math.log(2))
    assert guard.first_step(first(), REFS, 1.0, FPO) == guard.Verdict()


def test_a_larger_gap_passes_where_the_user_allows_it():
    apart = first(u=-0.02, rejected=0.3)
    assert guard.gaps(apart, REFS, FPO) == pytest.approx((0.2, 0.3))
    assert "log-probs differ by up to 0.3" in (
        guard.first_step(apart, REFS, 1.0, FPO, bound=0.25).reason or ""
    )
    allowed = guard.first_step(apart, REFS, 1.0, FPO, bound=0.31)
    assert allowed.reason is None
    assert "off by 0.2" in allowed.notes[0]


def test_a_constant_margin_starts_at_its_closed_form():
    """2 (-6/3 - -20/4) - 1 = 5 normalised; 2 (-6 - -20) - 1 = 27 in sums."""
    np.testing.assert_allclose(guard.closed_form(REFS, {}, SIMPO)[1], [5.0])
    sums = dataclasses.replace(SIMPO, length_normalize=False)
    np.testing.assert_allclose(guard.closed_form(REFS, {}, sums)[1], [27.0])
    assert guard.first_step(first(u=5.0), REFS, 1.0, SIMPO) == guard.Verdict()
    found = guard.first_step(first(u=0.0), REFS, 1.0, SIMPO).reason
    assert found is not None
    assert "differ by up to 2.5 nats" in found  # |0 - 5| / beta
    assert "start at 0.6931, not at 0.0067" in found


@pytest.mark.parametrize(
    ("seen", "grad_norm", "text"),
    [
        (first(), 0.0, "gradient is zero"),
        (first(u=-0.02), 1.0, "up to 0.2 nats per token, wanted less than 0.05"),
        (first(chosen=0.3, rejected=0.3), 1.0, "log-probs differ by up to 0.3 nats per token"),
        (first(loss=0.7), 1.0, "not what the objective makes of its log-probs"),
    ],
)
def test_step_zero_says_what_is_wrong_and_what_to_do(seen, grad_norm, text):
    found = guard.first_step(seen, REFS, grad_norm, FPO).reason
    assert found is not None
    assert text in found
    assert "`fpo-mlx" in found or "Check" in found


def test_a_small_difference_is_a_note():
    (note,) = guard.first_step(first(u=2e-4), REFS, 1.0, FPO).notes
    assert "0.002" in note
    assert guard.first_step(first(u=0.9e-4), REFS, 1.0, FPO).notes == ()


@pytest.mark.parametrize(
    ("preset", "changes", "facts", "want"),
    [
        ("dpo", {}, {}, math.log(2)),
        ("dpo", {"label_smoothing": 0.3}, {}, math.log(2)),
        ("dpo", {"nll_weight": 0.5}, {"weights": np.array([2.0])}, 2 * (math.log(2) + 1.0)),
        ("dpo", {"score_margin": 0.5}, {"score_gaps": np.array([2.0])}, math.log1p(math.e)),
        ("ipo", {}, {}, 25.0),
        ("hinge", {}, {}, 1.0),
        ("apo-zero", {}, {}, 1.0),
        ("apo-down", {}, {}, 1.0),
        ("ada-dpo", {}, {}, 0.01),
        ("sail-ddp", {}, {}, math.log(2) - 0.04 * math.log(2) ** 2),
        ("sft", {}, {}, 2.0),  # 6 nats over 3 tokens
        ("cpo", {}, {}, math.log1p(math.exp(-1.4)) + 2.0),  # 0.1 (-6 + 20)
    ],
)
def test_the_first_loss_that_the_self_check_expects_by_hand(preset, changes, facts, want):
    o = Objective(**{**PRESETS[preset], **changes})
    losses, _ = guard.closed_form(REFS, facts, o)
    np.testing.assert_allclose(losses, [want], rtol=1e-7)  # MLX holds 0.1 in float32


def test_a_wrong_loss_of_a_large_objective_is_found_and_rounding_is_not():
    ipo = Objective(**PRESETS["ipo"])
    assert guard.first_step(first(loss=25.0001), REFS, 1.0, ipo).reason is None
    assert "off by 0.1" in (guard.first_step(first(loss=25.1), REFS, 1.0, ipo).reason or "")


def test_a_gradient_of_zero_is_no_fault_where_there_is_nothing_to_teach():
    idle = {**first(loss=0.0), "weights": np.zeros(1)}
    assert guard.first_step(idle, REFS, 0.0, FPO).reason is None
    passed = Objective(**PRESETS["hinge"], gamma=-2.0)
    assert "gradient is zero" in (guard.first_step(first(), REFS, 0.0, passed).reason or "")
    done = first(u=5.0, loss=0.0)
    assert (
        guard.first_step(done, REFS, 0.0, dataclasses.replace(SIMPO, link="hinge")).reason is None
    )


def test_what_is_not_finite_is_left_to_the_divergence_guard():
    assert guard.first_step(first(), REFS, math.nan, FPO).reason is None
    assert guard.divergence(values(), TOKENS, math.nan, CONFIG, FPO) is not None


# Ends ---------------------------------------------------------------------------------------------


def test_skipping_ends_after_so_many_in_a_row_and_stopping_at_once():
    assert guard.too_many(1, TrainConfig())
    skip = TrainConfig(on_divergence="skip", max_skipped_updates=3)
    assert [guard.too_many(n, skip) for n in (1, 2, 3)] == [False, False, True]


def test_patience_counts_validations_without_a_better_loss():
    assert not guard.stale(99, TrainConfig())
    assert [guard.stale(n, TrainConfig(early_stopping=2)) for n in (0, 1, 2)] == [
        False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "setting", ["early_stopping", "max_skipped_updates", "max_feature_distance"]
)
def test_a_bound_of_zero_is_refused(setting):
    with pytest.raises(
        ConfigError, match=f"--{setting.replace('_', '-')} 0(.0)?: wanted more than 0"
    ):
        load_config({setting: 0})


@pytest.mark.parametrize("half", [False, True])
def test_a_cache_of_other_weights_may_be_farther_off_in_half_precision(half):
    """Between the bound and twice the bound: told of, or refused."""
    store = SimpleNamespace(folder="ref", differences={"model": ("old", "new")})
    trainer = SimpleNamespace(
        start_gaps=lambda: (0.01, 1.5 * CONFIG.max_start_gap),
        config=CONFIG,
        scorer=SimpleNamespace(half=half),
    )
    said = []
    if half:
        _compare_weights(trainer, store, said.append)
    else:
        with pytest.raises(CacheMismatch, match=f"over --max-start-gap {CONFIG.max_start_gap:g}"):
            _compare_weights(trainer, store, said.append)
    assert len(said) == half
