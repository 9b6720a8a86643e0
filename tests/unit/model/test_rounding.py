"""What is left of an adapter's change in the stored weights, by its definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from mlx_lm.models.switch_layers import SwitchLinear  # noqa: E402
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear  # noqa: E402

from fpo_mlx.model.fuse import FuseReport, below, fuse_layers  # noqa: E402
from fpo_mlx.model.rounding import Kept, Raised, plain_weight, rounded_to  # noqa: E402
from fpo_mlx.model.trees import cast_floats, float_dtype  # noqa: E402
from fpo_mlx.pipeline.fuse import said_of  # noqa: E402


def adapted_experts(size, *form, **more):
    """A quantised block of experts, one of small and one of large weights, and their change."""
    mx.random.seed(0)
    model, plain = nn.Module(), SwitchLinear(64, 32, 3)
    plain.weight = plain.weight * mx.array([0.1, 1.0, 3.0])[:, None, None]
    experts = plain.to_quantized(*form, **more)
    model.experts = LoRASwitchLinear.from_base(experts, r=4, scale=2.0)
    model.experts.lora_b = mx.random.normal(model.experts.lora_b.shape) * size
    lora = model.experts
    change = 2.0 * np.einsum("eor,eri->eoi", _numbers(lora.lora_b), _numbers(lora.lora_a))
    return model, _numbers(plain_weight(experts)), change


NVFP4 = (16, 4, "nvfp4")


@pytest.mark.parametrize("more", [{}, {"global_scale": True}])
def test_an_adapter_that_changes_nothing_leaves_experts_as_they_were(more):
    """mlx-lm's fuse forgets the scale that each expert has: 2688 where a weight is 0.006."""
    model, before, _ = adapted_experts(0.0, *NVFP4, **more)
    assert fuse_layers(model, {}) == (1, None)
    np.testing.assert_allclose(_numbers(plain_weight(model.experts)), before, rtol=1e-6)


@pytest.mark.parametrize("form", [NVFP4, (32, 4, "affine")])
def test_what_rounding_leaves_of_a_change_of_experts_is_measured(form):
    model, before, change = adapted_experts(0.1, *form)
    _, kept = fuse_layers(model, {})
    after = _numbers(plain_weight(model.experts)) - before
    assert kept is not None
    assert kept.bits == (4,)
    assert kept.share == pytest.approx((after * change).sum() / (change**2).sum(), rel=1e-4)
    error = np.linalg.norm(after - change) / np.linalg.norm(change)
    assert kept.error == pytest.approx(error, rel=1e-4)


def test_the_scale_of_an_expert_stays_float32_whatever_is_stored():
    """MLX refuses to read it in another type."""
    model, before, _ = adapted_experts(0.0, *NVFP4, global_scale=True)
    fuse_layers(model, {}, stored=mx.bfloat16)
    cast_floats(model, mx.bfloat16)
    assert model.experts.global_scale.dtype == mx.float32
    np.testing.assert_allclose(_numbers(plain_weight(model.experts)), before, rtol=1e-6)
    model.norm = nn.RMSNorm(4)
    cast_floats(model, mx.bfloat16)
    assert float_dtype(model) == mx.bfloat16


class One(nn.Module):
    """One adapted layer, base weight of some type and a small change."""

    def __init__(self, dtype):
        super().__init__()
        rng = np.random.default_rng(0)
        base = nn.Linear(64, 32, bias=False)
        base.weight = mx.array(rng.normal(size=(32, 64)).astype(np.float32)).astype(dtype)
        self.layer = LoRALinear.from_base(base, r=4, scale=2.0)
        self.layer.lora_a = mx.array(rng.normal(size=(64, 4)).astype(np.float32) * 0.03)
        self.layer.lora_b = mx.array(rng.normal(size=(4, 32)).astype(np.float32) * 0.03)


def _numbers(array):
    return np.array(array.astype(mx.float32), np.float64)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_what_half_precision_costs_is_measured(base, stored):
    model = One(getattr(mx, base))
    before = _numbers(model.layer.linear.weight)
    change = 2 * (_numbers(model.layer.lora_a) @ _numbers(model.layer.lora_b)).T
    count, kept = fuse_layers(model, {}, stored=getattr(mx, stored))
    after = _numbers(model.layer.weight) - before
    assert (count, str(model.layer.weight.dtype)) == (1, f"mlx.core.{stored}")
    assert kept is not None
    assert kept.bits == (16,)
    assert kept.share == pytest.approx((after * change).sum() / (change**2).sum(), rel=1e-4)
    error = np.linalg.norm(after - change) / np.linalg.norm(change)
    assert kept.error == pytest.approx(error, rel=1e-4)
    assert error > (0.3 if stored == "bfloat16" else 0.03)  # no little thing


def test_float32_loses_nothing_of_a_bfloat16_base():
    """The sum is not rounded to the base's type on its way."""
    model = One(mx.bfloat16)
    want = _numbers(model.layer.linear.weight)
    want += 2 * (_numbers(model.layer.lora_a) @ _numbers(model.layer.lora_b)).T
    _, kept = fuse_layers(model, {}, stored=mx.float32)
    assert kept is None
    np.testing.assert_allclose(_numbers(model.layer.weight), want, atol=1e-6)


def test_a_base_of_half_precision_is_measured_without_being_asked():
    kept = fuse_layers(One(mx.bfloat16), {})[1]
    assert kept is not None
    assert kept.bits == (16,)


@pytest.mark.parametrize(
    ("bits", "below", "error", "way"),
    [
        ((4,), 1, 0.5, "; --keep-bits 8 keeps the adapted layers at 8 bits, --dequantize --dtype "
         "float32 keeps all of it"),
        ((4,), 0, 0.5, "; --dequantize --dtype float32 keeps all of it"),  # experts alone
        ((8,), 0, 0.5, "; --dequantize --dtype float32 keeps all of it"),
        ((16,), 0, 0.5, "; --dtype float32 keeps all of it"),
        ((16,), 0, 0.1, ""),
    ],
)  # fmt: skip
def test_fusing_says_what_rounding_left_and_the_way_around_it(tmp_path, bits, below, error, way):
    report = FuseReport(tmp_path, 1, bits != (16,), kept=Kept(0.9, error, bits), below=below)
    said = f"rounding to {bits[0]} bits left 90% of the adapters' change, with an error "
    assert said_of(report) == [f"{said}{error:.2f} times its size{way}"]


def test_fusing_says_which_bits_the_adapted_layers_got_and_what_that_adds(tmp_path):
    raised = Raised(layers=28, bits=8, base_bits=(4, 6), added=12_340_000)
    assert said_of(FuseReport(tmp_path, 28, True, raised=raised)) == [
        "28 layers with adapters are kept at 8 bits, where the base has 4 and 6: 12.3 MB more; "
        "--keep-bits base leaves them the base's bits, and rounds most of a small change away"
    ]
    one = Raised(layers=1, bits=6, base_bits=(4,), added=900)
    (line,) = said_of(FuseReport(tmp_path, 1, True, raised=one))
    assert line.startswith("1 layer with adapters is kept at 6 bits, where the base has 4: 0.0 MB")


def test_experts_are_said_to_keep_the_bits_of_the_base():
    model, _, _ = adapted_experts(0.1, 32, 4, "affine")
    assert below(model, 8) == ({}, 1)
    assert below(model, 4) == ({}, 0)
    high, _, _ = adapted_experts(0.1, 32, 8, "affine")
    assert below(high, 8) == ({}, 0)


def test_more_bits_than_nvfp4_has_are_those_of_affine_in_groups_that_it_knows():
    base = nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), 16, 4, mode="nvfp4")
    fused = rounded_to(base, mx.zeros((32, 64)), 8)
    assert (fused.mode, fused.bits, fused.group_size) == ("affine", 8, 32)
    off = mx.abs(plain_weight(fused) - plain_weight(base)).max().item()
    assert off < 0.01 * mx.abs(plain_weight(base)).max().item()
