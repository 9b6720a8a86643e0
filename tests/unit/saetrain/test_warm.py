"""Starting from an SAE: nothing is lost on the way in and out, and few updates are needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_saetrain import ACTIVE, contents, factors, run_all, stop_after

mx = pytest.importorskip("mlx.core")

from tiny_saes import CASES  # noqa: E402

from fpo_mlx.core.dictionary import Rule  # noqa: E402
from fpo_mlx.errors import Interrupted, SaeError  # noqa: E402
from fpo_mlx.records import SaeWeights, Site  # noqa: E402
from fpo_mlx.sae import load_sae  # noqa: E402
from fpo_mlx.sae.encode import decode, encode  # noqa: E402
from fpo_mlx.saetrain import finish, rows, state, trainer, warm  # noqa: E402
from fpo_mlx.saetrain.trainer import Plan  # noqa: E402


def made(kind: str, rng: np.random.Generator, *, even: bool) -> SaeWeights:
    """8 inputs, 24 features, a bias of its own on the way in, decoder rows of many lengths."""
    w_dec = rng.standard_normal((24, 8)).astype(np.float32)
    if even:
        w_dec *= 0.3 / np.linalg.norm(w_dec, axis=1, keepdims=True)
    return SaeWeights(
        kind,
        rng.standard_normal((8, 24)).astype(np.float32),
        rng.standard_normal(24).astype(np.float32),
        b_in=rng.standard_normal(8).astype(np.float32),
        threshold=rng.uniform(0.1, 2, 24).astype(np.float32) if kind == "jumprelu" else None,
        act_scale=rng.uniform(0.5, 2, 24).astype(np.float32) if kind == "jumprelu" else None,
        k=5 if kind == "topk" else None,
        w_dec=w_dec,
        b_dec=(20 * rng.standard_normal(8)).astype(np.float32),
    )


def written(sae: SaeWeights, data: np.ndarray) -> SaeWeights:
    """What is written after no step at all."""
    rule = Rule(sae.activation, sae.k or 5, (sae.n_features,))
    begun = warm.started(sae, data, rule)
    return finish.finished(begun, rule, data, site=Site(0), model_name="m")


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_without_a_step_the_sae_written_is_the_sae_read(kind):
    rng = np.random.default_rng(3)
    sae = made(kind, rng, even=kind == "topk")
    data = (7 * rng.standard_normal((300, 8)) + 40).astype(np.float32)
    out = written(sae, data)
    acts = encode(sae, data)
    assert (acts > 0).mean() > 0.1
    np.testing.assert_allclose(encode(out, data), acts, rtol=1e-4, atol=1e-4 * acts.max())
    recon = decode(sae, acts, data)
    np.testing.assert_allclose(
        decode(out, encode(out, data), data), recon, atol=1e-4 * np.abs(recon).max()
    )


def test_one_feature_by_hand():
    """x = 7, b_in 1, w 2, b_enc -3, decoder 4, b_dec 5: pre = 9, acts 9, recon 41.

    Rows 3 and 7 have a standard deviation of 2, so s = 1/2, u = (7 - 5) / 2 = 1; the encoder is
    2 * 4 = 8, the bias 4 * (-3 + (5 - 1) * 2) / 2 = 10, so pre_u = 18 = 9 * 4 / 2; recon_u = 18 =
    (41 - 5) / 2.
    """
    one = np.float32
    sae = SaeWeights(
        "jumprelu", one([[2]]), one([-3]), b_in=one([1]), threshold=one([8]), w_dec=one([[4]]),
        b_dec=one([5]),
    )  # fmt: skip
    begun = warm.started(sae, one([[3], [7]]), Rule("jumprelu", 1, (1,)))
    assert begun.scale == 0.5
    assert begun.centre.tolist() == [5]
    found = {name: np.array(value).ravel().tolist() for name, value in begun.params.items()}
    assert found["w_enc"] == [8]
    assert found["b_enc"] == [10]
    assert found["w_dec"] == [1]
    assert np.exp(found["log_threshold"]) == pytest.approx([16])
    assert begun.lengths.tolist() == [4]
    back = written(sae, one([[3], [7]]))
    assert encode(back, one([[7]])).tolist() == [[9]]
    assert decode(back, one([[9]]), one([[7]])).tolist() == [[41]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_public_layout_is_started_from_exactly_or_refused(case, tmp_path):
    rng = np.random.default_rng(0)
    made = case.make(tmp_path, rng)
    sae = load_sae(made.path, allow_pickle=case.pickled, **made.options)
    data = (3 * rng.standard_normal((64, sae.d_in))).astype(np.float32)
    if sae.activation not in ("topk", "jumprelu") or sae.transcoder or sae.normalize != "none":
        with pytest.raises(SaeError, match="--init"):
            warm.check(sae, sae.activation)
        return
    if sae.activation == "topk":  # random rows; a trained one has them of one length
        rows = sae.w_dec / np.linalg.norm(sae.w_dec, axis=1, keepdims=True)
        sae = replace(sae, w_dec=rows, act_scale=None)
    if sae.centred or sae.w_dec is None:
        return
    acts = encode(sae, data)
    out = written(sae, data)
    np.testing.assert_allclose(encode(out, data), acts, atol=2e-4 * max(acts.max(), 1))


def test_what_cannot_be_gone_on_with_says_why():
    sae = made("topk", np.random.default_rng(0), even=True)
    with pytest.raises(SaeError, match="--architecture topk"):
        warm.check(sae, "batchtopk")
    with pytest.raises(SaeError, match="differ in length"):
        warm.check(made("topk", np.random.default_rng(0), even=False), "topk")
    for change, part in (
        ({"activation": "relu"}, "is a relu SAE"),
        ({"w_dec": None}, "no decoder"),
        ({"transcoder": True}, "transcoder"),
        ({"normalize": "layer_norm"}, "layer_norm"),
        ({"centred": True}, "centred"),
    ):
        with pytest.raises(SaeError, match=part):
            warm.check(replace(sae, **change), "topk")


def test_a_row_of_zeros_in_the_decoder_stays_one_and_spoils_nothing():
    rng = np.random.default_rng(1)
    sae = made("jumprelu", rng, even=False)
    sae.w_dec[3] = 0
    sae.act_scale[3] = 0
    sae.threshold[5] = -1  # max(pre, 0) by itself
    data = rng.standard_normal((200, 8)).astype(np.float32)
    out = written(sae, data)
    acts = encode(sae, data)
    np.testing.assert_allclose(encode(out, data), acts, atol=1e-4 * acts.max())
    rule = Rule("jumprelu", 5, (24,))
    begun = warm.started(sae, data, rule)
    trainer.step(begun, rule, Plan(10, 200, 200, 1e-3, 0, 10_000), data)
    assert all(np.isfinite(np.array(value)).all() for value in begun.params.values())


def trained(architecture: str, data: np.ndarray, steps: int) -> tuple[SaeWeights, Rule]:
    rule = Rule(architecture, ACTIVE, (256,), aux_k=32)
    run = state.fresh(data[:4096], rule, seed=0, centre="geometric_median")
    list(trainer.train(rows.from_array(data), run, rule, Plan(steps, 512, 512, 3e-3, 0, 10_000)))
    return finish.finished(run, rule, data[:2000], site=Site(0), model_name="m"), rule


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_an_sae_of_a_near_model_needs_few_updates_to_fit_again(architecture):
    """The same factors, their directions turned a little, as a tuned model's might be."""
    data = factors(20_000)[1]
    sae, rule = trained(architecture, data, 250)
    turn = np.eye(64) + 0.03 * np.random.default_rng(5).standard_normal((64, 64))
    other = (data @ turn).astype(np.float32)
    plan = Plan(40, 512, 512, 3e-3, 0, 10_000)
    cold = state.fresh(other[:4096], rule, seed=0, centre="geometric_median")
    begun = warm.started(sae, other[:4096], rule)
    trainer.warm(begun, rule, plan, other[:4096])
    ends = [
        list(trainer.train(rows.from_array(other), run, rule, plan))[-1] for run in (cold, begun)
    ]
    assert ends[1].loss < 0.6 * ends[0].loss


def test_warming_moves_no_weight_and_counts_its_gradients():
    data = factors(5_000)[1]
    sae, rule = trained("topk", data, 50)
    plan = Plan(40, 512, 256, 3e-3, 0, 10_000)
    begun = warm.started(sae, data[:1100], rule)
    before = {name: np.array(value) for name, value in begun.params.items()}
    trainer.warm(begun, rule, plan, data[:1100])
    assert begun.warmed == 2
    for name, value in begun.params.items():
        np.testing.assert_array_equal(np.array(value), before[name])
    # Adam's mean of two gradients g1, g2, by its own recursion: 0.1 * (0.9 g1 + g2)
    parts = [trainer._measured(begun, rule, plan, data[at : at + 512]) for at in (0, 512)]
    g1, g2 = (np.array(part.grads["b_enc"]) for part in parts)
    wanted = 0.1 * (0.9 * g1 + g2)
    np.testing.assert_allclose(np.array(begun.first["b_enc"]), wanted, atol=1e-7)


def test_a_sample_smaller_than_a_batch_warms_the_moments_too():
    data = factors(2_000)[1]
    sae, rule = trained("topk", data, 20)
    begun = warm.started(sae, data[:300], rule)
    trainer.warm(begun, rule, Plan(40, 512, 512, 3e-3, 0, 10_000), data[:300])
    assert begun.warmed == 1
    assert np.abs(np.array(begun.first["b_enc"])).max() > 0


def test_a_started_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
    data = factors(4_000)[1]
    sae, rule = trained("topk", data, 30)
    plan = Plan(24, 64, 32, 3e-3, 7, 256, report_every=4, save_every=5)

    def begin(rule, sample):
        begun = warm.started(sae, sample, rule)
        trainer.warm(begun, rule, plan, sample)
        return begun

    monkeypatch.setattr("test_saetrain.start", begin)
    source = rows.from_array(data)
    run_all(tmp_path / "whole", rule, source, plan)
    with pytest.raises(Interrupted):
        run_all(tmp_path / "cut", rule, source, plan, stop_after(9))
    run_all(tmp_path / "cut", rule, source, plan)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    ends = [state.load(tmp_path / name / state.STATE) for name in ("cut", "whole")]
    assert ends[0].warmed == ends[1].warmed == 512 // 64
    np.testing.assert_array_equal(ends[0].lengths, ends[1].lengths)
