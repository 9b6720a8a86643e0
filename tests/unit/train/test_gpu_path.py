"""The branches that only a GPU takes, forced on a CPU: start, gradient, buffers."""

from __future__ import annotations

from dataclasses import replace

import buffers
import gpu_path
import numpy as np
import pytest
from gpu_path import CASES, RECORD, Case, cosine, gradient_of, open_case, start_of

from fpo_mlx.config import PRESETS
from fpo_mlx.machine import device
from fpo_mlx.model.heads import ReplayedHead, half_head
from fpo_mlx.model.trees import blocks_of
from fpo_mlx.pipeline.plan import fuses_attention
from fpo_mlx.train.optimizer import trainable_count


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def forced():
    with device.using(RECORD):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_starts_where_its_objective_says(root, forced, case):
    """The first training loss too, though the pass with gradient runs other kernels."""
    start = start_of(open_case(root, case))
    assert start.holds(case.dtype), start
    assert start.distance <= (1e-8 if case.dtype == "float32" else 1e-3)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [("plain", "float32"), ("affine", "bfloat16"), ("affine", "float16")],
)
def test_every_preset_starts_where_its_closed_form_says(root, forced, weights, dtype):
    """In half precision too, in micro batches whose shapes differ from the reference's."""
    trainer = open_case(root, Case(weights=weights, dtype=dtype, micro=2))
    for preset in PRESETS:
        start = gpu_path.start_with(trainer, preset)
        assert start.holds(dtype), (preset, start)


@pytest.mark.parametrize("weights", ["affine", "mxfp4"])
def test_a_packed_head_is_found_whatever_its_packing(root, forced, weights):
    trainer = open_case(root, Case(weights=weights))
    assert not isinstance(trainer.scorer.policy.head, ReplayedHead)
    assert trainer.scorer.half


@pytest.mark.parametrize("case", CASES[:2] + CASES[4:5] + CASES[6:], ids=str)
def test_the_gradient_is_the_float32_models(root, case):
    """The same stored weights, widened: what half precision may lose is a small angle."""
    wide = open_case(root, case)
    gpu_path.stir(wide)
    want = gradient_of(wide, [0, 1, 2, 3])
    with device.using(RECORD):
        half = open_case(root, case)
        gpu_path.stir(half)
        got = gradient_of(half, [0, 1, 2, 3])
    least = {"float32": 1 - 1e-6, "float16": 0.999, "bfloat16": 0.98}[case.dtype]
    if case.maker in gpu_path.WIDE:  # rounding changes which experts a token goes through
        least = 0.95
    assert cosine(got, want) > least
    assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(want), rel=0.1)


@pytest.mark.parametrize("divisor", [4, 1024])
def test_a_float16_gradient_does_not_depend_on_the_size_of_the_update(root, divisor):
    """The pairs of an update only divide; unscaled, 1,024 of them leave 0.98 here."""
    case = Case(dtype="float16")
    wide = open_case(root, case)
    gpu_path.stir(wide)
    want = gradient_of(wide, [0, 1])
    with device.using(RECORD):
        half = open_case(root, case)
        gpu_path.stir(half)
        got = gpu_path.divided(half, 0, 1, divisor)
    assert cosine(got, want) >= 0.999
    np.testing.assert_allclose(got.std() * divisor, want.std() * 2, rtol=0.02)


def test_parameters_are_counted_as_values_not_as_packed_words(root, forced):
    plain, packed = (
        trainable_count(open_case(root, Case(weights=weights)).model)
        for weights in ("plain", "affine")
    )
    assert plain == packed


@pytest.mark.parametrize(
    ("weights", "dtype", "half"),
    [("plain", "bfloat16", True), ("affine", "bfloat16", False), ("plain", "float32", False)],
)
def test_plan_reads_from_the_model_whether_its_head_is_widened_by_tiles(
    root, forced, weights, dtype, half
):
    trainer = open_case(root, Case(weights=weights, dtype=dtype))
    config = {"vocab_size": trainer.scorer.policy.vocab_size}
    assert half_head(trainer.model, config) is half
    assert trainer.scorer.policy.head.half is half


@pytest.mark.parametrize(("maker", "fused"), [("llama", True), ("gemma2", False)])
def test_plan_reads_from_the_model_whether_its_attention_is_fused(root, forced, maker, fused):
    """Gemma 2 makes its scores by hand; MLX's kernel has no backward pass for heads of 8."""
    block = blocks_of(open_case(root, Case(maker)).model)[0]
    assert fuses_attention(block, 64) is fused
    assert not fuses_attention(block, 8)


def test_sizes_are_padded_to_a_bucket_and_say_the_same(root):
    trainer = open_case(root, Case("llama", "plain", "float32"))
    pairs = trainer.train.pairs
    plain = trainer.scorer.reader.scores(pairs)
    with device.using(replace(RECORD, bucket=32)):
        padded = trainer.scorer.reader.scores(pairs)
    for a, b in zip(plain, padded, strict=True):
        np.testing.assert_allclose([s.logps for s in a], [s.logps for s in b], atol=1e-4)


def test_freed_buffers_stay_under_their_limit_and_active_memory_is_flat(root):
    """A short form of scripts/checks/buffers.py."""
    seen = buffers.watch(root, updates=12, limit=1 << 20)
    assert set(seen) == {"precompute", "evaluate", "train"}
    for one in seen.values():
        assert one.cached <= 1 << 20
        assert one.growth <= 0.02


def test_what_is_wired_is_a_share_and_goes_back(monkeypatch):
    calls = []
    monkeypatch.setattr("mlx.core.set_wired_limit", lambda n: calls.append(n) or 7)
    monkeypatch.setattr(device, "backend", lambda: "metal")
    monkeypatch.setattr(device, "memory", lambda: 16e9)
    with device.using(RECORD):
        with device.resident(0.75, processes=2):
            assert calls == [6_000_000_000]
        assert calls == [6_000_000_000, 7]
        with device.resident(0.0):
            pass
    with device.resident(0.75):  # the record of a CPU
        pass
    assert len(calls) == 2


def test_a_record_is_chosen_for_both_kinds():
    small, large = device.gpu("metal", 5e9), device.gpu("cuda", 80e9)
    assert (small.widen, small.fold, small.streams) == (False, False, 1)
    assert small.row_elements * 4 == int(5e9 / 64) // 4 * 4
    assert large.row_elements * 4 == device.LARGE
    assert (small.cache_limit, large.cache_limit) == (int(5e9 / 16), device.MOST_CACHE)
    with device.using(small):
        assert device.here() is small
    here = device.here()
    assert (here.kind, here.widen, here.fold) == ("cpu", True, True)


def test_a_record_that_equals_another_below_is_the_one_that_goes():
    """CPU in GPU in CPU: what lies in the middle is in force again afterwards."""
    middle = device.gpu("metal", 5e9)
    with device.using(device.here()), device.using(middle):
        with device.using(replace(device.here())):
            pass
        with device.using(device.cpu()), device.using(replace(device.cpu())):
            pass
        assert device.here() is middle
