"""The training loop on a tiny model: what a setting may change, and what it may not."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from helpers import SIZES, open_trainer, random_adapters, random_pairs, weights  # noqa: E402

from fpo_mlx.config import PRESETS  # noqa: E402
from fpo_mlx.errors import ConfigError, Diverged, ModelError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.records import TokenPair  # noqa: E402
from fpo_mlx.train import guard  # noqa: E402
from fpo_mlx.train.events import (  # noqa: E402
    StepReport,
    ValidReport,
)
from fpo_mlx.train.metrics import measure  # noqa: E402

PAIRS = random_pairs(SIZES)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def moved(llama, tmp_path_factory):
    """A scorer whose policy is not the reference, on both paths, and each pair alone."""
    out = {}
    for share in (True, False):
        trainer = open_trainer(
            llama, tmp_path_factory.mktemp("out"), PAIRS, share_prompt=share,
            objective={"feature_scale": "reference"},
        )  # fmt: skip
        values = {k: mx.array(v) for k, v in random_adapters(trainer.model).items()}
        adapters.update(trainer.model, values)
        out[share] = trainer.scorer, trainer.train.refs
    scorer, refs = out[True]
    alone = [score(scorer, refs, [i]) for i in range(len(PAIRS))]
    return out, alone


def score(scorer, refs, indices) -> np.ndarray:
    """[n, 3]: u, D chosen, D rejected of each pair, scored together."""
    pairs, chosen = [PAIRS[i] for i in indices], [refs[i] for i in indices]
    losses, measures = scorer.losses(pairs, chosen, grad=True)
    return np.concatenate([np.array(losses.u)[:, None], np.array(measures.distances).T], axis=1)


@settings(max_examples=12)
@given(st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=5), st.booleans())
def test_a_pair_scores_the_same_in_any_company_order_and_padding(moved, indices, share):
    """Alone with a shared prompt nothing is padded to a companion; side by side nearly all is."""
    scorers, alone = moved
    got = score(*scorers[share], indices)
    want = np.concatenate([alone[i] for i in indices])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert np.abs(want).min() > 1e-5


def test_a_response_scores_as_its_exact_length_does(moved):
    """Equal responses need no padding at all; beside a longer companion they are padded."""
    (scorer, refs), _ = moved[0][False], None
    equal = next(i for i, size in enumerate(SIZES) if size[1] == size[2] and size[0] > 1)
    longest = max(range(len(PAIRS)), key=lambda i: PAIRS[i].tokens)
    assert PAIRS[longest].tokens > PAIRS[equal].tokens
    np.testing.assert_allclose(
        score(scorer, refs, [equal])[0], score(scorer, refs, [longest, equal])[1], rtol=1e-4
    )


def run(llama, out, pairs=PAIRS, **settings):
    trainer = open_trainer(llama, out, pairs, **settings)
    reports = list(trainer.run())
    return trainer, reports


@pytest.mark.parametrize("preset", ["fpo", "tdpo2"])
def test_accumulation_and_micro_batches_are_memory_settings_only(llama, tmp_path, preset):
    """By SGD: Adam would turn a gradient of nearly zero, and so its rounding, into a full step."""
    results = []
    for size, accumulate, micro in [(4, 1, 1), (4, 1, 3), (2, 2, 2), (1, 4, 4)]:
        trainer, reports = run(
            llama, tmp_path / f"{size}{micro}", preset=preset, batch_size=size,
            grad_accumulation_steps=accumulate, micro_batch_size=micro, iters=3 * accumulate,
            optimizer="sgd", learning_rate=0.05,
        )  # fmt: skip
        steps = [r for r in reports if isinstance(r, StepReport)]
        assert [r.pairs for r in steps] == [4, 8, 12]
        results.append(([r.loss for r in steps], weights(trainer)))
    for losses, adapted in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-5)
        for name, array in adapted.items():
            np.testing.assert_allclose(array, results[0][1][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("size", "accumulate", "epochs"), [(2, 1, 1), (3, 1, 2), (2, 2, 3), (3, 2, 2), (1, 5, 2)]
)
def test_every_pair_is_trained_on_once_an_epoch(llama, tmp_path, size, accumulate, epochs):
    pairs = random_pairs([(2, 2, 2)] * 7)
    trainer = open_trainer(
        llama, tmp_path, pairs, preset="dpo", batch_size=size, epochs=float(epochs),
        grad_accumulation_steps=accumulate, learning_rate=1e-5,
    )  # fmt: skip
    seen = []
    original = trainer._gradient
    trainer._gradient = lambda indices: seen.extend(indices) or original(indices)
    list(trainer.run())
    assert len(seen) == epochs * len(pairs)
    for epoch in range(epochs):
        assert sorted(seen[epoch * 7 : epoch * 7 + 7]) == list(range(7))


def test_the_last_update_is_as_whole_as_the_others(llama, tmp_path):
    """Pairs of an update are sorted by length: a part of it would be the shorter ones."""
    trainer = open_trainer(
        llama, tmp_path, PAIRS, preset="dpo", batch_size=1, grad_accumulation_steps=4, iters=6,
        learning_rate=1e-5,
    )  # fmt: skip
    seen, original = [], trainer._gradient
    trainer._gradient = lambda indices: seen.append(sorted(indices)) or original(indices)
    list(trainer.run())
    assert sorted(seen[0] + seen[1]) == list(range(8))


def test_a_report_is_the_mean_over_the_pairs_since_the_last(llama, tmp_path):
    """Seven pairs in batches of three: the short batch weighs by its pairs, not as a batch."""
    trainer = open_trainer(
        llama, tmp_path, PAIRS[:7], batch_size=3, steps_per_report=3, iters=3
    )  # fmt: skip
    seen, original = [], trainer._gradient

    def gradient(indices):
        values, total = original(indices)
        seen.append(values)
        return values, total

    trainer._gradient = gradient
    (report,) = [r for r in trainer.run() if isinstance(r, StepReport)]
    assert sorted(len(v["loss"]) for v in seen) == [1, 3, 3]
    for name in ("loss", "rewards/margins", "features/rejected", "logps/chosen"):
        values = np.concatenate([v[name] for v in seen])
        got = report.loss if name == "loss" else report.metrics[name]
        assert len(values) == 7
        np.testing.assert_allclose(got, sum(values) / 7, rtol=1e-6)
    assert report.pairs == 7
    # the first three are judged before any update: no margin but rounding's, no pair won
    won = [v["rewards/chosen"] > v["rewards/rejected"] for v in seen[1:]]
    assert min(np.abs(v["rewards/margins"]).min() for v in seen[1:]) > 1e-4
    share = np.concatenate(won).sum() / 7
    assert report.metrics["rewards/accuracies"] == pytest.approx(share)


def test_a_validation_covers_every_pair_and_best_is_the_lowest(llama, tmp_path):
    """The learning rate is made to overshoot, so that the best is not the last."""
    trainer = open_trainer(
        llama, tmp_path, PAIRS[:4], valid=PAIRS[4:], batch_size=4, iters=8, steps_per_eval=1,
        val_batches=-1, learning_rate=3e-2, preset="simpo", max_margin=1e9, max_logp_drop=1e9,
    )  # fmt: skip
    kept, reports = {}, []
    for report in trainer.run():
        reports.append(report)
        if isinstance(report, ValidReport):
            kept[report.iteration] = weights(trainer)
            values = measure(trainer.scorer, trainer.valid, 3)
            assert report.pairs == 4
            np.testing.assert_allclose(report.loss, values["loss"].mean(), rtol=1e-5)
    losses = {r.iteration: r.loss for r in reports if isinstance(r, ValidReport)}
    assert list(losses) == list(range(9))
    lowest = min(losses, key=lambda i: losses[i])
    best = mx.load(str(tmp_path / "best" / "adapters.safetensors"))
    for name, array in kept[lowest].items():
        np.testing.assert_array_equal(np.array(best[name]), array)
    flags = [r.iteration for r in reports if isinstance(r, ValidReport) and r.best]
    assert flags[-1] == lowest == trainer.progress.best_iteration
    assert lowest != 8, "the test's learning rate must overshoot"


def test_val_batches_bounds_a_validation(llama, tmp_path):
    trainer = open_trainer(
        llama, tmp_path, PAIRS[:2], valid=PAIRS, batch_size=3, val_batches=1, iters=1
    )
    reports = [r for r in trainer.run() if isinstance(r, ValidReport)]
    assert [r.pairs for r in reports] == [3, 3]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_learns_to_prefer_the_chosen(llama, tmp_path, preset):
    """Chosen tokens are below 150, rejected ones above: separable."""
    rng = np.random.default_rng(0)
    pairs = random_pairs([(4, 4, 4)] * 4)
    for pair in pairs:
        pair.chosen[:], pair.rejected[:] = rng.integers(3, 150, 4), rng.integers(150, 300, 4)
    trainer = open_trainer(
        llama, tmp_path, pairs, preset=preset, batch_size=4, iters=12, learning_rate=1e-2,
        objective={"beta": 1.0, "alpha": 0.01}, max_logp_drop=1e9,
    )  # fmt: skip
    before = weights(trainer)
    steps = [r for r in trainer.run() if isinstance(r, StepReport)]
    after = weights(trainer)
    # IPO's loss is a square: at this rate the margin passes through its best value
    end = min(steps, key=lambda step: step.loss) if preset == "ipo" else steps[-1]
    assert end.loss < 0.7 * steps[0].loss
    assert end.metrics["rewards/margins"] > steps[0].metrics["rewards/margins"] + 0.3
    # a hinge is satisfied before lora_a, which waits for lora_b, has a gradient to speak of
    moved = [name for name in before if preset != "hinge" or name.endswith("lora_b")]
    assert all(np.abs(after[name] - before[name]).max() > 1e-4 for name in moved)


SCHEDULE = {"name": "cosine_decay", "arguments": [1e-2, 10], "warmup": 2}


def test_a_schedule_of_mlx_lm_counts_updates(llama, tmp_path):
    """Linear warm-up from 0 over 2 updates, then cosine: by hand."""
    _, reports = run(llama, tmp_path, lr_schedule=SCHEDULE, iters=10, grad_accumulation_steps=2)
    rates = [r.learning_rate for r in reports if isinstance(r, StepReport)]
    want = [0.0, 5e-3, 1e-2, 1e-2, 5e-3 * (1 + np.cos(np.pi / 10))]
    np.testing.assert_allclose(rates, want, rtol=1e-5)


def test_a_schedule_that_is_none_is_refused(llama, tmp_path):
    with pytest.raises(ConfigError, match="lr_schedule"):
        open_trainer(llama, tmp_path, PAIRS, lr_schedule={"name": "cosine", "arguments": [1]})
    with pytest.raises(ConfigError, match="optimizer_config"):
        open_trainer(llama, tmp_path, PAIRS, optimizer_config={"adam": {"weight_decay": 1}})


@pytest.mark.parametrize(("bound", "moves"), [(1e-3, 1e-3), (0, None), (None, None), (1e9, None)])
def test_the_gradient_norm_is_clipped_to_its_bound(llama, tmp_path, bound, moves):
    """With plain gradient descent at rate 1 the adapters move by the clipped norm itself."""
    trainer = open_trainer(
        llama, tmp_path, PAIRS, optimizer="sgd", learning_rate=1.0, max_grad_norm=bound, iters=1
    )
    before = weights(trainer)
    (report,) = [r for r in trainer.run() if isinstance(r, StepReport)]
    moved = sum(((weights(trainer)[k] - v) ** 2).sum() for k, v in before.items()) ** 0.5
    assert report.grad_norm > 1e-2, "the reported norm is the one before clipping"
    np.testing.assert_allclose(moved, moves or report.grad_norm, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd", "adafactor"])
@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
def test_every_optimizer_steps_by_its_learning_rate(llama, tmp_path, optimizer, fine_tune_type):
    """A thousand times the rate moves the adapters by some thousand times as much."""
    moves = []
    for rate in (1e-6, 1e-3):
        trainer = open_trainer(
            llama, tmp_path / str(rate), PAIRS, optimizer=optimizer, iters=1, learning_rate=rate,
            fine_tune_type=fine_tune_type,
        )  # fmt: skip
        before = weights(trainer)
        list(trainer.run())
        after = weights(trainer)
        moves.append(max(np.abs(after[k] - v).max() for k, v in before.items() if "lora_b" in k))
    assert moves[0] > 0
    np.testing.assert_allclose(moves[1] / moves[0], 1000, rtol=0.1)


def test_dora_trains_its_magnitudes_saves_and_loads(llama, tmp_path):
    trainer, _ = run(llama, tmp_path, fine_tune_type="dora", iters=2)
    fresh = open_trainer(llama, tmp_path / "other", PAIRS, fine_tune_type="dora")
    start, saved = weights(fresh), weights(trainer)
    assert any(np.abs(saved[k] - start[k]).max() > 1e-4 for k in start if k.endswith(".m"))
    adapters.fill(fresh.model, tmp_path)
    got = measure(fresh.scorer, trainer.train)
    want = measure(trainer.scorer, trainer.train)
    np.testing.assert_array_equal(got["loss"], want["loss"])


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
@pytest.mark.parametrize("preset", ["fpo", "tdpo2"])
def test_gradient_checkpointing_changes_nothing_even_with_dropout(
    llama, tmp_path, preset, fine_tune_type
):
    """The recomputed pass must drop the same inputs as the first."""
    results = []
    for checkpoint in (False, True):
        trainer = open_trainer(
            llama, tmp_path / str(checkpoint), PAIRS, dropout=0.3, grad_checkpoint=checkpoint,
            fine_tune_type=fine_tune_type, preset=preset,
        )  # fmt: skip
        trainer.scorer.freeze_reference()
        values = {k: mx.array(v) for k, v in random_adapters(trainer.model).items()}
        adapters.update(trainer.model, values)
        trainer.model.train()
        mx.random.seed(5)
        seen, gradient = trainer._gradient(np.arange(3))
        results.append((seen["loss"], dict(mlx_flat(gradient))))
    (loss, plain), (same, recomputed) = results
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    for name, want in plain.items():
        size = np.abs(want).max()
        np.testing.assert_allclose(recomputed[name], want, atol=1e-4 * size, err_msg=name)


def mlx_flat(tree):
    from mlx.utils import tree_flatten

    return [(k, np.array(v)) for k, v in tree_flatten(tree)]


def test_the_kl_is_taken_to_a_reference_without_dropout(llama, tmp_path):
    """With an adapter as the reference, its own LoRA branch must not lose inputs at random."""
    trainer = open_trainer(llama, tmp_path, PAIRS, preset="tdpo2", dropout=0.5)
    values = {k: mx.array(v) for k, v in random_adapters(trainer.model).items()}
    adapters.update(trainer.model, values)
    trainer.scorer.freeze_reference()
    noisy = {k: v * 1.5 for k, v in values.items()}
    adapters.update(trainer.model, noisy)
    policy = trainer.scorer.policy
    trainer.model.train()
    seen, original = [], policy.rows
    policy.rows = lambda pairs: seen.append(original(pairs)) or seen[-1]
    for _ in range(2):
        trainer.scorer.losses(PAIRS[:2], trainer.train.refs[:2], grad=True)
    own, ref, own_again, ref_again = [np.array(rows.hidden) for rows in seen]
    np.testing.assert_array_equal(ref, ref_again)
    assert np.abs(own - own_again).max() > 1e-3
    assert trainer.model.training


def test_an_adapter_as_the_start_passes_step_zero_with_dropout(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, preset="dpo", dropout=0.5, iters=1)
    adapters.update(
        trainer.model, {k: mx.array(v) for k, v in random_adapters(trainer.model).items()}
    )
    refs = trainer.scorer.reader.scores(PAIRS)
    trainer.train = type(trainer.train)(PAIRS, refs)
    (report, _) = list(trainer.run())
    assert report.warnings == ()


def test_another_models_reference_is_refused_at_step_zero(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, iters=1)
    adapters.update(
        trainer.model, {k: mx.array(v) for k, v in random_adapters(trainer.model).items()}
    )
    with pytest.raises(ModelError, match="the policy is not the reference"):
        list(trainer.run())
    assert not (tmp_path / "adapters.safetensors").exists()


def test_training_without_a_gradient_is_refused(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, iters=1)
    for name, module in trainer.model.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")) and "lora_a" in module:
            module.scale = 0.0
    with pytest.raises(ModelError, match="gradient is zero"):
        list(trainer.run())


# Divergence ---------------------------------------------------------------------------------------


def finite(path) -> bool:
    return all(np.isfinite(np.array(v)).all() for v in mx.load(str(path)).values())


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_adapters_that_turn_infinite_stop_the_run_and_stay_off_the_disk(llama, tmp_path, poison):
    def stop() -> None:  # is asked after every update
        if trainer.progress.iteration == 4:
            name, array = adapters.parameters(trainer.model)[0]
            adapters.update(trainer.model, {name: array * float(poison)})

    trainer = open_trainer(
        llama, tmp_path, PAIRS, valid=PAIRS[:2], iters=20, save_every=3, stop=stop
    )
    with pytest.raises(Diverged, match="iteration 5: .*not finite") as error:
        list(trainer.run())
    assert error.value.exit_code == 4
    assert finite(tmp_path / "adapters.safetensors")
    assert str(tmp_path) in str(error.value)
    assert "best" in str(error.value)


def test_poison_before_the_first_update_leaves_no_adapters(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, preset="simpo", iters=3)
    name, array = adapters.parameters(trainer.model)[0]
    adapters.update(trainer.model, {name: array * float("nan")})
    with pytest.raises(Diverged, match="iteration 1: .*no adapters were written"):
        list(trainer.run())
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("optimizer", "rate", "preset"),
    # APO's losses are bounded: after the first fall there is no gradient left to diverge by
    [("adam", 30.0, "fpo")]
    + [("sgd", 3e38, preset) for preset in PRESETS if not preset.startswith("apo")],
)
def test_a_huge_learning_rate_keeps_the_adapters_from_before(
    llama, tmp_path, preset, optimizer, rate
):
    """What is kept still scores: the margin is inside the bounds that stopped the run."""
    trainer = open_trainer(
        llama, tmp_path, PAIRS, preset=preset, iters=20, learning_rate=rate, optimizer=optimizer,
        max_grad_norm=None, batch_size=8,
    )  # fmt: skip
    with pytest.raises(Diverged) as error:
        list(trainer.run())
    assert error.value.exit_code == 4
    assert "adapters from before it" in str(error.value)
    assert finite(tmp_path / "adapters.safetensors")
    values = measure(trainer.scorer, trainer.train)
    assert np.isfinite(values["loss"]).all()
    tokens = np.array([len(pair.chosen) for pair in PAIRS])
    fall = -(values["logps_per_token/chosen_change"] * tokens).sum() / tokens.sum()
    assert fall < trainer.config.max_logp_drop


def test_the_guard_weighs_each_pair_by_the_tokens_of_its_chosen_response(
    llama, tmp_path, monkeypatch
):
    seen, divergence = [], guard.divergence
    monkeypatch.setattr(
        guard,
        "divergence",
        lambda v, tokens, *rest: seen.append(tokens) or divergence(v, tokens, *rest),
    )
    trainer = open_trainer(llama, tmp_path, PAIRS, iters=3, batch_size=2)
    updates, gradient = [], trainer._gradient
    monkeypatch.setattr(trainer, "_gradient", lambda at: updates.append(at) or gradient(at))
    list(trainer.run())
    assert [t.tolist() for t in seen] == [[len(PAIRS[i].chosen) for i in at] for at in updates]
    assert any(len(PAIRS[i].chosen) != len(PAIRS[i].rejected) for at in updates for i in at)


def test_a_fall_of_the_chosen_log_prob_past_the_bound_stops(llama, tmp_path):
    trainer = open_trainer(
        llama, tmp_path, PAIRS, iters=60, learning_rate=3e-2, max_logp_drop=1e-4,
        objective={"alpha": 0.0},
    )  # fmt: skip
    with pytest.raises(Diverged, match="chosen log-prob fell"):
        list(trainer.run())


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 1), (1, 2), (1, 1)])
def test_rows_that_turn_each_other_round_share_an_update_where_they_can(
    llama, tmp_path, monkeypatch, batch_size, accumulate
):
    twins = []
    for one in random_pairs(SIZES[:3]):
        for wanted, (better, worse) in ((5, one.responses), (6, one.responses[::-1])):
            prompt = np.append(one.prompt, np.int32(wanted))
            twins.append(TokenPair(prompt, better, worse, index=len(twins)))
    trainer = open_trainer(
        llama, tmp_path, twins, batch_size=batch_size, grad_accumulation_steps=accumulate, iters=6,
        preset="dpo", steps_per_report=1,
    )  # fmt: skip
    updates, gradient = [], trainer._gradient
    monkeypatch.setattr(trainer, "_gradient", lambda at: updates.append(at) or gradient(at))
    reports = [r for r in trainer.run() if isinstance(r, StepReport)]
    parted = batch_size * accumulate == 1
    assert all(len(at) == 2 and at[0] ^ 1 == at[1] for at in updates) is not parted
    told = [w for r in reports for w in r.warnings if "an even --batch-size" in w]
    assert len(told) == parted
