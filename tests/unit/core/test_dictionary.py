"""The numbers of SAE training against autograd in float64 and against torch's Adam."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

from fpo_mlx.core import dictionary, selection  # noqa: E402
from fpo_mlx.core.dictionary import Rule  # noqa: E402

N, D, F, K = 70, 12, 64, 5
EIGHTHS = (8, 16, 32, 64)


def some_params(seed: int = 0, threshold: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    w_dec = rng.standard_normal((F, D)).astype(np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    made = {
        "w_enc": (w_dec + 0.2 * rng.standard_normal((F, D))).astype(np.float32),
        "b_enc": (0.1 * rng.standard_normal(F)).astype(np.float32),
        "w_dec": w_dec,
        "b_dec": (0.3 * rng.standard_normal(D)).astype(np.float32),
    }
    if threshold:
        made["log_threshold"] = np.log(rng.uniform(0.5, 1.5, F)).astype(np.float32)
    return made


def some_rows(seed: int = 1, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


class Jump(torch.autograd.Function):
    """pre * H(pre - theta), and H(pre - theta) itself, with the rectangle kernel's gradient."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        gate = (pre > theta).to(pre)
        return pre * gate, gate

    @staticmethod
    def backward(ctx, d_acts, d_gate):
        pre, theta = ctx.saved_tensors
        kernel = ((pre - theta).abs() < ctx.width / 2).to(pre) / ctx.width
        d_theta = -(kernel * (d_acts * theta + d_gate)).sum(dim=0)
        return d_acts * (pre > theta), d_theta, None


def oracle(rule, params, rows, weight, pull, dead):
    """(loss, gradients by autograd), float64."""
    p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in params.items()}
    x = torch.tensor(rows, dtype=torch.float64)
    pre = (x - p["b_dec"]) @ p["w_enc"].T + p["b_enc"]
    total = torch.zeros((), dtype=torch.float64)
    if rule.architecture == "jumprelu":
        acts, gate = Jump.apply(pre, p["log_threshold"].exp(), rule.bandwidth)
        total = total + pull * weight * gate.sum()
    elif rule.architecture == "topk":
        values, index = pre.topk(rule.k, dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, index, values.relu())
    else:
        bound = pre.flatten().topk(rule.k * len(x)).values[-1]
        acts = torch.where(pre >= bound, pre, torch.zeros_like(pre)).relu()
    errors = [acts[:, :end] @ p["w_dec"][:end] + p["b_dec"] - x for end in rule.groups]
    loss = sum(e.pow(2).sum() for e in errors) * weight / (D * len(errors))
    total = total + loss
    if dead is not None:
        spare = (x - p["b_dec"].detach()) @ p["w_enc"][dead].T + p["b_enc"][dead]
        values, index = spare.relu().topk(min(rule.aux_k, len(dead)), dim=-1)
        spare = torch.zeros_like(spare).scatter(-1, index, values)
        aux = (spare @ p["w_dec"][dead] + errors[-1].detach()).pow(2).sum() * weight / D
        total = total + rule.aux_weight * aux
    total.backward()
    return loss.item(), {k: v.grad.numpy() for k, v in p.items()}


def ours(rule, params, rows, weight, pull, dead):
    arrays = {name: mx.array(value) for name, value in params.items()}
    listed = None if dead is None else mx.array(np.pad(dead, (0, 3), constant_values=-1))
    return dictionary.gradients(rule, arrays, mx.array(rows), weight, mx.array(pull), listed)


CASES = [
    pytest.param(Rule("topk", K, (F,), sparse=True), id="topk, sparse decoder"),
    pytest.param(Rule("topk", K, (F,), sparse=False), id="topk, dense decoder"),
    pytest.param(Rule("topk", K, EIGHTHS), id="topk, matryoshka"),
    pytest.param(Rule("batchtopk", K, (F,)), id="batchtopk"),
    pytest.param(Rule("batchtopk", K, EIGHTHS), id="batchtopk, matryoshka"),
    pytest.param(Rule("jumprelu", K, (F,), bandwidth=0.4), id="jumprelu"),
    pytest.param(Rule("jumprelu", K, EIGHTHS, bandwidth=0.4), id="jumprelu, matryoshka"),
]


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("dead", [None, [3, 9, 20, 41]], ids=["all alive", "some dead"])
def test_loss_and_gradient_are_those_of_autograd_in_float64(rule, dead):
    if dead is not None:
        rule = Rule(**{**vars(rule), "aux_k": 2})
    params, rows = some_params(threshold=rule.architecture == "jumprelu"), some_rows()
    pull = 0.07 if rule.architecture == "jumprelu" else 0.0
    loss, wanted = oracle(rule, params, rows, 1 / N, pull, dead)
    done = ours(rule, params, rows, 1 / N, pull, dead)
    assert float(done.loss) == pytest.approx(loss, rel=1e-5)
    assert set(done.grads) == set(wanted)
    for name, grad in wanted.items():
        assert np.abs(grad).max() > 1e-4, f"{name}: the case says nothing"
        near = 1e-5 * np.abs(grad).max()
        np.testing.assert_allclose(np.array(done.grads[name]), grad, atol=near, err_msg=name)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_micro_batches_add_up_to_the_batch(architecture):
    rule = Rule(architecture, K, (F,), aux_k=2, bandwidth=0.4)
    params, rows = some_params(threshold=architecture == "jumprelu"), some_rows()
    whole = ours(rule, params, rows, 1 / N, 0.07, [3, 9, 20])
    cut = [ours(rule, params, rows[a : a + 20], 1 / N, 0.07, [3, 9, 20]) for a in range(0, N, 20)]
    done = dictionary.add_parts(cut)
    for name in whole.grads:
        near = 1e-6 * float(mx.abs(whole.grads[name]).max())
        np.testing.assert_allclose(done.grads[name], whole.grads[name], atol=max(near, 1e-7))
    for name in ("loss", "l0", "threshold"):
        assert float(getattr(done, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-5)
    np.testing.assert_array_equal(done.fired, whole.fired)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([7, 64, 100, 256, 1024]), st.integers(1, 40))
def test_largest_finds_the_k_largest_of_every_row(seed, width, k):
    # ties too: with only 50 different values, the values must be right, whichever indices
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 50, (3, width)).astype(np.float32)
    index = np.array(selection.largest(mx.array(values), k))
    k = min(k, width)
    assert index.shape == (3, k)
    for row, picked in zip(values, index, strict=True):
        assert len(set(picked.tolist())) == k
        np.testing.assert_array_equal(np.sort(row[picked]), np.sort(row)[width - k :])


def test_batchtopk_spends_k_features_a_token_on_average_where_they_are_needed():
    rows = some_rows()
    rows[: N // 2] *= 3
    params = {k: mx.array(v) for k, v in some_params().items()}
    pre = dictionary.pre_activations(params, mx.array(rows))
    acts = dictionary.activate(Rule("batchtopk", K, (F,)), params, pre)
    active = np.array(acts > 0).sum(axis=1)
    assert active.sum() == N * K
    assert active[: N // 2].mean() > 1.5 * active[N // 2 :].mean()


def test_a_step_is_adams_and_keeps_the_decoders_rows_at_length_1():
    params, rng = some_params(threshold=True), np.random.default_rng(5)
    own = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items() if k != "w_dec"}
    rates = {name: 1e-2 * (10 if name == "log_threshold" else 1) for name in own}
    adam = torch.optim.Adam([{"params": [own[name]], "lr": rates[name]} for name in own])
    arrays = {k: mx.array(v) for k, v in params.items()}
    first, second = ({k: mx.zeros_like(v) for k, v in arrays.items()} for _ in range(2))
    for step in range(3):
        grads = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in params.items()}
        for name, value in own.items():
            value.grad = torch.tensor(grads[name])
        adam.step()
        given = {k: mx.array(v) for k, v in grads.items()}
        arrays, first, second = dictionary.adam_step(arrays, given, first, second, 1e-2, step + 1)
    for name, value in own.items():
        np.testing.assert_allclose(arrays[name], value.detach().numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(arrays["w_dec"], axis=1), 1, rtol=1e-6)
    assert np.abs(np.array(arrays["w_dec"]) - params["w_dec"]).max() > 1e-3


def test_a_decoder_gradient_along_its_row_moves_nothing():
    arrays = {"w_dec": mx.array(some_params()["w_dec"])}
    zeros = {"w_dec": mx.zeros((F, D))}
    _, first, _ = dictionary.adam_step(arrays, arrays, zeros, zeros, 1e-3, 1)
    np.testing.assert_allclose(first["w_dec"], 0, atol=1e-7)  # nothing but rounding is left
