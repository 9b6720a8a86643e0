"""Pure array functions: by hand, against plain numpy, and with the chunks cut otherwise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from helpers import F, random_sae  # noqa: E402

from fpo_mlx.core import features, logprobs  # noqa: E402
from fpo_mlx.core.linear_head import LinearHead, Packing  # noqa: E402
from fpo_mlx.machine import device  # noqa: E402
from fpo_mlx.model.reader import encoder_of  # noqa: E402
from fpo_mlx.records import Site  # noqa: E402
from fpo_mlx.sae.encode import encode, normalized  # noqa: E402

ACTIVATIONS = ["relu", "jumprelu", "gated", "topk", "abstopk", "groupmax", "identity"]
RNG = np.random.default_rng(0)
D, V, R = 16, 37, 11
WEIGHT = mx.array(RNG.normal(size=(V, D)).astype(np.float32))
ROWS = mx.array(RNG.normal(size=(R, D)).astype(np.float32))
REF = mx.array(RNG.normal(size=(R, D)).astype(np.float32))
TARGETS = mx.array(RNG.integers(0, V, R).astype(np.int32))
HEADS = {
    "plain": lambda rows: rows @ WEIGHT.T,
    "soft-cap": lambda rows: 3.0 * mx.tanh(rows @ WEIGHT.T / 3.0),
    "bfloat16": lambda rows: rows.astype(mx.bfloat16) @ WEIGHT.astype(mx.bfloat16).T,
}


def logps_and_kl(rows, ref, targets, head, vocab, **how):
    found = logprobs.token_values(rows, targets, head, vocab, ref_hidden=ref, **how)
    return found.logps, found.kl


def sizes(monkeypatch, **changes):
    """Tiles of other sizes than this device's."""
    record = replace(device.here(), **changes)
    monkeypatch.setattr(device, "_chosen", [record])


def test_token_logps_by_hand():
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    rows = mx.array([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, 0.0]])
    got = logprobs.token_logps(rows, mx.array([0, 0, 1]), lambda x: x, 2)
    np.testing.assert_allclose(np.array(got), np.log([1 / 4, 3 / 4, 1 / 2]), rtol=1e-6)


def test_kl_by_hand():
    """KL of (1/2, 1/2) from (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3."""
    policy, ref = mx.array([[0.0, math.log(3)]]), mx.array([[5.0, 5.0]])
    _, kl = logps_and_kl(policy, ref, mx.array([0]), lambda x: x, 2)
    np.testing.assert_allclose(np.array(kl), [0.5 * math.log(4 / 3)], rtol=1e-5)


def test_a_token_that_neither_model_can_say_adds_nothing_to_the_kl_or_its_slope():
    """Phi-3-small puts -inf at ids that are no tokens; 0 (-inf - -inf) is no number."""

    def head(rows):
        return mx.concatenate([rows, mx.full((rows.shape[0], 1), -mx.inf)], axis=-1)

    def kl(rows):
        return logps_and_kl(rows, ref, mx.array([0]), head, 3)[1].sum()

    policy, ref = mx.array([[0.0, math.log(3)]]), mx.array([[5.0, 5.0]])
    value, slope = mx.value_and_grad(kl)(policy)
    np.testing.assert_allclose(value.item(), 0.5 * math.log(4 / 3), rtol=1e-5)
    np.testing.assert_allclose(slope, [[1 / 4 - 1 / 2, 3 / 4 - 1 / 2]], rtol=1e-5)


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("head", ["plain", "linear"])
def test_log_collisions_by_hand(head, with_kl):
    """Probabilities 1/4 and 3/4: 1/16 + 9/16 = 5/8; 1/2 and 1/2: a half."""
    rows = mx.array([[0.0, math.log(3)], [2.0, 2.0]])
    function = LinearHead(mx.eye(2)) if head == "linear" else lambda x: x
    ref = rows[::-1] if with_kl else None
    got = logprobs.token_values(
        rows, mx.array([0, 1]), function, 2, ref_hidden=ref, collisions=True
    )  # fmt: skip
    np.testing.assert_allclose(np.array(got.log_collisions), np.log([5 / 8, 1 / 2]), rtol=1e-5)
    np.testing.assert_allclose(np.array(got.logps), np.log([1 / 4, 1 / 2]), rtol=1e-5)
    assert (got.kl is not None) is with_kl


@pytest.mark.parametrize("fold", [True, False])
def test_log_collisions_go_over_all_tiles_and_chunks(monkeypatch, fold):
    sizes(monkeypatch, vocab_columns=8, vocab_rows=4, fold=fold, row_elements=4 * V)
    got = logprobs.token_values(ROWS, TARGETS, LinearHead(WEIGHT), V, collisions=True)
    p = np.array(mx.softmax((ROWS @ WEIGHT.T).astype(mx.float32), axis=-1), np.float64)
    np.testing.assert_allclose(np.array(got.log_collisions), np.log((p**2).sum(-1)), rtol=1e-4)
    plain = logprobs.token_logps(ROWS, TARGETS, LinearHead(WEIGHT), V)
    np.testing.assert_array_equal(np.array(got.logps), np.array(plain))


def values_and_slope(head, weights):
    def total(rows):
        logps, kl = logps_and_kl(rows, REF, TARGETS, head, V)
        alone = logprobs.token_logps(rows, TARGETS, head, V)
        return (weights * (alone - 2 * logps + kl)).sum(), (alone, kl)

    (_, seen), slope = mx.value_and_grad(total)(ROWS)
    return [np.array(a) for a in (*seen, slope)]


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("elements", [1, 2 * V, 4 * V + 1, 1 << 23])
def test_log_probs_and_kl_do_not_depend_on_the_chunks(monkeypatch, name, elements):
    """Against autograd of one plain expression over all rows."""
    cut = logprobs.row_chunks
    monkeypatch.setattr(logprobs, "row_chunks", lambda n, width: cut(n, width, elements))
    weights = mx.arange(1.0, R + 1.0) / R
    got = values_and_slope(HEADS[name], weights)

    def plain(rows):
        logits, ref = (HEADS[name](x).astype(mx.float32) for x in (rows, REF))
        policy = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ref = ref - mx.logsumexp(ref, axis=-1, keepdims=True)
        picked = mx.take_along_axis(policy, TARGETS[:, None], axis=-1)[:, 0]
        kl = (mx.exp(ref) * (ref - policy)).sum(axis=-1)
        return (weights * (kl - picked)).sum(), (picked, kl)

    (_, seen), slope = mx.value_and_grad(plain)(ROWS)
    # bfloat16 rounds a head's slopes; what is made of its logits is in float32
    tolerances = (1e-5, 1e-5, 0.2 if name == "bfloat16" else 1e-5)
    for a, b, tolerance in zip(got, [*seen, slope], tolerances, strict=True):
        np.testing.assert_allclose(a, np.array(b), atol=tolerance)
    off = logprobs.token_logps(ROWS, TARGETS, HEADS[name], V, grad=False)
    np.testing.assert_array_equal(np.array(off), got[0])


@pytest.mark.parametrize("vocab", [1, 7, 2048, 4099, 49152])
def test_log_sum_exp_holds_for_every_vocabulary(vocab):
    """1, a prime below and above the inner sum, and multiples of it."""
    logits = np.random.default_rng(vocab).normal(size=(3, vocab)) * 4
    want = np.log(np.exp(logits).sum(axis=-1))
    got = np.array(logprobs.logsumexp(mx.array(logits.astype(np.float32))))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 if vocab == 4099 else 2e-5)


LINEAR = {
    "plain": LinearHead(WEIGHT),
    "bias": LinearHead(WEIGHT, bias=WEIGHT.sum(axis=1)),
    "scale and soft-cap": LinearHead(WEIGHT, scale=0.5, cap=3.0),
    "bfloat16": LinearHead(WEIGHT.astype(mx.bfloat16)),
    "bfloat16, bias and soft-cap": LinearHead(
        WEIGHT.astype(mx.bfloat16), bias=WEIGHT.sum(axis=1), scale=0.5, cap=3.0
    ),
}


@pytest.mark.parametrize("name", list(LINEAR))
@pytest.mark.parametrize(("tile", "chunk"), [(1, R), (5, 1), (V - 1, 4), (V, 3), (2048, 1024)])
def test_log_probs_do_not_depend_on_the_tiles_of_the_vocabulary(monkeypatch, name, tile, chunk):
    """Log-probs, KL and their gradients against the same head in chunks of rows."""
    sizes(monkeypatch, vocab_columns=tile, vocab_rows=chunk)
    of_tiles_and_rows(name)


@pytest.mark.parametrize("name", list(LINEAR))
@pytest.mark.parametrize("elements", [1, 3 * V, 1 << 20])
def test_whole_rows_give_what_tiles_give(monkeypatch, name, elements):
    """A GPU's way, chunks filled up to four rows; a half-precision matrix goes by its own."""
    sizes(monkeypatch, fold=False, row_elements=elements, bucket=4)
    of_tiles_and_rows(name)


@pytest.mark.parametrize("name", [name for name in LINEAR if "bfloat16" in name])
@pytest.mark.parametrize(("wide", "rows"), [(10 * D, 3), (10 * D, R), (V * D, 4), (1 << 20, R)])
def test_wide_tiles_of_a_half_precision_matrix_give_what_its_float32_form_gives(
    monkeypatch, name, wide, rows
):
    """Four tiles, and one; the rows whole and in chunks."""
    sizes(monkeypatch, fold=False, wide_elements=wide, vocab_rows=rows, bucket=1)
    of_tiles_and_rows(name)


def test_log_collisions_go_over_all_wide_tiles(monkeypatch):
    head = LINEAR["bfloat16"]
    p = np.array(mx.softmax(ROWS @ head.weight.astype(mx.float32).T, axis=-1), np.float64)
    sizes(monkeypatch, fold=False, wide_elements=10 * D)
    for ref in (None, REF):
        got = logprobs.token_values(ROWS, TARGETS, head, V, ref_hidden=ref, collisions=True)
        found = np.array(got.log_collisions)
        np.testing.assert_allclose(found, np.log((p**2).sum(-1)), rtol=1e-4)


def of_tiles_and_rows(name):
    """Against the same head, widened, in chunks of rows of any function."""
    head, weights = LINEAR[name], mx.arange(1.0, R + 1.0) / R
    wide = head.widened()
    rows, ref = (x.astype(head.weight.dtype) for x in (ROWS, REF))

    def alone(rows, any_head, grad=True):
        return (logprobs.token_logps(rows, TARGETS, any_head, V, grad=grad),)

    def with_kl(rows, any_head, grad=True):
        return logps_and_kl(rows, ref, TARGETS, any_head, V, grad=grad)

    for function, mix in ((alone, (1.0,)), (with_kl, (1.0, 0.0)), (with_kl, (0.5, -2.0))):
        slope = mx.value_and_grad(
            lambda x, any_head, f=function, m=mix: sum(
                (weights * values * w).sum() for values, w in zip(f(x, any_head), m, strict=True)
            )
        )
        _, got_slope = slope(rows, head)
        _, want_slope = slope(rows, lambda x: wide(x.astype(mx.float32)))
        a, b = (np.array(x.astype(mx.float32)) for x in (got_slope, want_slope))
        np.testing.assert_allclose(a, b, atol=0.05 if "bfloat16" in name else 2e-5)
        on, off, want = (
            function(rows, head),
            function(rows, head, False),
            function(rows, lambda x: wide(x.astype(mx.float32))),
        )
        for a, b, c in zip(on, off, want, strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
            np.testing.assert_allclose(np.array(a), np.array(c), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "bfloat16"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_kl_of_a_policy_from_itself_is_exactly_nothing(monkeypatch, fold, name):
    sizes(monkeypatch, vocab_columns=5, fold=fold, wide_elements=5 * D)
    _, kl = logps_and_kl(ROWS, ROWS, TARGETS, LINEAR[name], V)
    np.testing.assert_array_equal(np.array(kl), 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_head_has_the_values_and_gradient_of_its_dequantised_matrix(monkeypatch, bits):
    sizes(monkeypatch, vocab_columns=10)
    weight = mx.array(RNG.normal(size=(V, 32)).astype(np.float32))
    rows = mx.array(RNG.normal(size=(R, 32)).astype(np.float32))
    packed, scales, biases = mx.quantize(weight, 32, bits)
    packing = Packing(scales, biases, 32, bits, "affine")
    plain = LinearHead(mx.dequantize(packed, scales, biases, 32, bits))

    def slope(head):
        return mx.value_and_grad(
            lambda x: (logprobs.token_logps(x, TARGETS, head, V) * mx.arange(R)).sum()
        )(rows)

    for a, b in zip(slope(LinearHead(packed, packing=packing)), slope(plain), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


WIDE = {"fold": False, "wide_elements": 2048 * D}  # a GPU's way through a half-precision matrix


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize(
    ("dtype", "changes"), [(mx.float32, {}), (mx.bfloat16, {}), (mx.bfloat16, WIDE)]
)
def test_peak_memory_of_the_loss_does_not_grow_with_the_vocabulary(
    monkeypatch, dtype, changes, with_kl
):
    """V eight times as large: the same temporaries, but for the matrix itself and tiles' sums.

    MLX allocates some operations ahead of the arithmetic, how many is a race: medians of five.
    """
    sizes(monkeypatch, **changes)
    heads = [LinearHead(mx.random.normal((v, D)).astype(dtype)) for v in (1 << 14, 1 << 17)]
    peaks = [_peak_of_the_loss(head, head.vocab_size, 16, with_kl) for head in heads]
    assert peaks[1] <= 1.2 * peaks[0]


def test_peak_memory_of_the_loss_does_not_grow_with_the_rows(monkeypatch):
    """Of a head that is no matrix, whose rows go by eights."""
    cut, vocab = logprobs.row_chunks, 1 << 13
    monkeypatch.setattr(logprobs, "row_chunks", lambda n, width: cut(n, width, 8 * vocab))
    weight = mx.random.normal((vocab, D))
    peaks = [_peak_of_the_loss(lambda x: x @ weight.T, vocab, n, False) for n in (64, 256)]
    assert peaks[1] <= 1.2 * peaks[0]


def _peak_of_the_loss(head, vocab: int, n: int, with_kl: bool) -> float:
    goals = mx.random.randint(0, vocab, (n,))
    rows, ref = mx.random.normal((n, D)), mx.random.normal((n, D))

    def loss(x):
        if not with_kl:
            return logprobs.token_logps(x, goals, head, vocab).sum()
        return sum(v.sum() for v in logps_and_kl(x, ref, goals, head, vocab))

    mx.eval(head(rows[:1]), goals, rows, ref)  # the matrix, too
    peaks = []
    for _ in range(5):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss)(rows))
        peaks.append(mx.get_peak_memory() - before)
    return np.median(peaks)


def test_row_chunks_cover_every_row_once():
    assert logprobs.row_chunks(7, 10, 30) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert logprobs.row_chunks(2, 10, 1) == [slice(0, 1), slice(1, 2)]


# Features -----------------------------------------------------------------------------------------


def sae_of(activation: str, normalize: str = "none"):
    from dataclasses import replace

    sae = random_sae(activation, D, Site(0))
    scale = None if activation == "identity" else np.linspace(0.5, 2, F, dtype=np.float32)
    return replace(sae, normalize=normalize, act_scale=scale)


def activations(sae) -> np.ndarray:
    """The numpy encoder's; it has no identity, which is the normalised input itself."""
    rows = np.array(ROWS)
    return normalized(sae, rows) if sae.activation == "identity" else encode(sae, rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
def test_encode_equals_the_numpy_encoder(activation, normalize):
    sae = sae_of(activation, normalize)
    got = np.array(features.encode(encoder_of(sae), ROWS))
    want = activations(sae)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert (want != 0).any(axis=1).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (3, 5), (R, 20), (4, F), (1024, 1 << 20)])
def test_pool_is_the_mean_of_the_activations(monkeypatch, activation, rows, tile):
    """Two responses of 4 and 7 rows; whatever the chunks of rows and the tiles of features."""
    sizes(monkeypatch, pool_rows=rows, pool_elements=1, top_elements=1)
    monkeypatch.setattr(features, "LEAST_TILE", tile)
    sae = sae_of(activation)
    weights = np.zeros((2, R), dtype=np.float32)
    weights[0, :4], weights[1, 4:] = 1 / 4, 1 / 7
    pooled, gates = features.pool(encoder_of(sae), ROWS, mx.array(weights))
    acts = activations(sae)
    want = np.stack([acts[:4].mean(axis=0), acts[4:].mean(axis=0)])
    np.testing.assert_allclose(np.array(pooled), want, atol=1e-5)
    assert gates is None or len(gates) == R


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_selected_means_have_the_gradient_of_the_full_encoding(activation, normalize):
    encoder = encoder_of(sae_of(activation, normalize))
    indices = mx.array(
        [0, 3, 5, 11, 2, 15] if activation == "identity" else [0, 47, 12, 13, 14, 31]
    )
    cotangent = mx.array([1.0, -2.0, 0.5, 3.0, 1.5, -1.0])
    _, gate = features.pool(encoder, ROWS, mx.full((1, R), 1 / R))

    def full(rows):
        return (features.encode(encoder, rows).mean(axis=0)[indices] * cotangent).sum()

    def some(rows):
        return (features.selected_means(encoder, rows, gate, indices) * cotangent).sum()

    (a, da), (b, db) = (mx.value_and_grad(f)(ROWS) for f in (full, some))
    np.testing.assert_allclose(float(a), float(b), atol=1e-5)
    np.testing.assert_allclose(np.array(da), np.array(db), atol=1e-5)
    assert np.abs(np.array(da)).max() > 1e-3


def test_the_union_counts_an_index_once_by_hand():
    """{1, 4} and {4, 7} and the named 1, with 7 silent in the second set."""
    parts = [
        (mx.array([[1, 4]]), mx.array([[1.0, 1.0]])),
        (mx.array([[4, 7]]), mx.array([[1.0, 0.0]])),
        (mx.array([[7, 1]]), mx.array([[1.0, 1.0]])),
    ]
    indices, mask = features.union_indices(parts)
    assert indices.tolist() == [[1, 4, 4, 7, 7, 1]]
    assert mask.tolist() == [[1, 1, 0, 0, 1, 0]]


def test_the_top_set_leaves_out_silent_features_by_hand():
    pooled = mx.array([[0.0, 3.0, 0.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    indices, mask = features.top_set(pooled, 3)
    kept = [
        {i for i, m in zip(*row, strict=True) if m}
        for row in zip(indices.tolist(), mask.tolist(), strict=True)
    ]
    assert kept == [{1, 3}, {0, 1, 2}]
    wide, _ = features.top_set(pooled, 50)
    assert wide.shape == (2, 5)
    signed, _ = features.top_set(mx.array([[-9.0, 1.0, 2.0]]), 1, magnitude=True)
    assert signed.tolist() == [[0]]


def test_distance_and_scale_by_hand():
    """(1/k) sum w (p - r)^2 with k = 2: (1*1 + 0.5*16) / 2 = 4.5; mean square (9 + 16) / 2."""
    got = features.distance(
        mx.array([3.0, 5.0, 9.0]), mx.array([2.0, 1.0, 0.0]), mx.array([1.0, 0.5, 0.0]), 2
    )
    assert got.item() == 4.5
    assert features.reference_scale(mx.array([[3.0, 4.0, 1.0]]), 2).tolist() == [12.5]
    assert features.reference_scale(mx.zeros((1, 3)), 2).tolist() == [1.0]  # silent: no scale
