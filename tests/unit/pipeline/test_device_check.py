"""The device check is right on a CPU, and a fault in a kernel makes that kernel's line WRONG."""

from __future__ import annotations

import getpass
import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from fpo_mlx.core import dictionary, features, linear_head, selection, whole_rows
from fpo_mlx.errors import Diverged, ModelError
from fpo_mlx.machine import device
from fpo_mlx.pipeline import device_check
from fpo_mlx.pipeline.device_check import kernels, launches, runs, speed
from fpo_mlx.pipeline.device_check.lines import Line
from fpo_mlx.pipeline.device_check.places import REAL, SMALL, float_bits, on_cpu, under_test
from fpo_mlx.train.scoring import Scorer


def wrong(lines) -> set[str]:
    return {line.name for line in lines if line.verdict == "WRONG"}


def test_a_line_is_wrong_above_its_bound_and_where_it_is_no_number():
    verdicts = [Line("p", "n", value, 1.0).verdict for value in (0.5, 1.0, 1.5, math.nan)]
    assert verdicts == ["ok", "ok", "WRONG", "WRONG"]
    assert Line("p", "n", math.inf).verdict == "seen"


def test_every_kernel_is_right_here_and_every_kind_has_its_line():
    found = list(kernels.lines(SMALL))
    assert wrong(found) == set()
    names = {line.name for line in found}
    assert {f"pooling, {kind}" for kind in kernels.KINDS} < names
    assert {f"head and loss, {kind}" for kind in kernels.HEADS} < names
    assert {"KL", "features with gradient", "top-k, rows of another set"} < names


# What is planted -> the one line that may see it. A CPU's branches stay right: they are the truth.


def _on_device(function, fault, only=lambda *_: True):
    """The function, with a fault in what it gives back down the GPU's branches."""

    def faulty(*args, **kwargs):
        found = function(*args, **kwargs)
        return fault(found) if device.here().gpu and only(*args) else found

    return faulty


def _louder(found):
    return found * 1.01


def _of_kind(kind):
    return lambda encoder, *_: encoder.activation == kind


def _first_larger(parts):
    grads = dict(parts.grads)
    grads["w_enc"] = grads["w_enc"] * 1.01
    return replace(parts, grads=grads)


PACKED = {"4 bits": "affine", "mxfp4": "mxfp4"}
FAULTS = {
    **{
        f"head and loss, {name}": (
            linear_head.Packing, "multiply", _louder, lambda packing, *_, m=mode: packing.mode == m,
        )
        for name, mode in PACKED.items()
    },
    "head and loss, bfloat16": (
        linear_head.LinearHead, "slope_of", _louder, lambda head, *_: head.half,
    ),
    "KL": (whole_rows, "_cross", _louder, lambda *_: True),
    **{
        f"pooling, {kind}": (
            features, "activate", _louder,
            lambda encoder, raw, pre, gate, indices, *_, k=kind: (
                encoder.activation == k and not (k == "jumprelu" and indices.size == 64)
            ),
        )
        for kind in kernels.KINDS
    },
    "features with gradient": (features, "selected_means", _louder, lambda *_: True),
    "top-k, rows of another set": (selection, "largest", lambda found: found + 1, lambda *_: True),
    **{
        f"SAE training, {kind}": (
            dictionary, "gradients", _first_larger, lambda rule, *_, k=kind: rule.architecture == k,
        )
        for kind in kernels.TRAINED
    },
}  # fmt: skip


@pytest.mark.parametrize("line", list(FAULTS))
def test_a_fault_in_one_kernel_makes_its_line_wrong_and_no_other(monkeypatch, line):
    owner, name, fault, only = FAULTS[line]
    monkeypatch.setattr(owner, name, _on_device(getattr(owner, name), fault, only))
    assert wrong(kernels.lines(SMALL)) == {line}


def test_a_fault_in_the_fused_loss_shows_wherever_rows_are_whole(monkeypatch):
    real = mx.fast.cross_entropy
    monkeypatch.setattr(whole_rows.mx.fast, "cross_entropy", lambda *a: real(*a) * 1.01)
    whole = {f"head and loss, {kind}" for kind in ("4 bits", "mxfp4", "float32")}
    assert wrong(kernels.lines(SMALL)) == whole


@pytest.mark.parametrize(("packing", "dtype"), runs.BACKBONES)
def test_a_fault_in_a_packed_layer_makes_its_backbone_wrong(monkeypatch, packing, dtype):
    def only(layer, rows):
        return layer.mode == packing and rows.dtype == getattr(mx, dtype)

    call = _on_device(nn.QuantizedLinear.__call__, lambda found: found * 1.5, only)
    monkeypatch.setattr(nn.QuantizedLinear, "__call__", call)
    assert wrong(runs.backbones(SMALL)) == {f"backbone, {packing} in 4 bits, {dtype}"}


def test_runs_start_at_ln_2_here_and_a_shift_of_the_policy_is_wrong(monkeypatch):
    assert wrong(runs.starts(SMALL)) == set()
    real = Scorer.see

    def shifted(self, pairs, refs, *, grad):
        seen, measures = real(self, pairs, refs, grad=grad)
        logps = seen.logps + mx.array([[5.0], [0.0]])  # nats, of every chosen response
        return seen._replace(logps=logps), replace(measures, logps=logps)

    monkeypatch.setattr(Scorer, "see", shifted)
    names = wrong(runs.starts(SMALL, ["bfloat16"]))
    assert {name.partition(": ")[2] for name in names} == {"|u| / beta", "first loss less ln 2"}


def test_twenty_updates_follow_the_cpu_and_another_rate_does_not(monkeypatch):
    assert wrong(runs.updates()) == set()
    real = runs.make_trainer

    def faster(world):
        trainer = real(world)
        if device.here().gpu:
            trainer.optimizer.learning_rate = 2 * runs.RATE
        return trainer

    monkeypatch.setattr(runs, "make_trainer", faster)
    assert wrong(runs.updates()) == {f"{runs.UPDATES} losses"}


def test_launches_hold_their_bounds_and_more_of_them_do_not(monkeypatch):
    assert wrong(launches.lines()) == set()
    monkeypatch.setitem(launches.LOSS, (4, True), 10)
    assert wrong(launches.lines()) == {"head and loss, 4 bits, with gradient"}


def test_times_and_memory_are_told_and_held_where_a_gpu_is(monkeypatch):
    found = list(speed.lines(SMALL, gpu=False))
    assert wrong(found) == set()
    names = [line.name for line in found if line.bound is None]
    assert {"FPO / SimPO", "FPO / mlx-lm SFT", "peak over what plan says"} <= set(names)
    monkeypatch.setattr(
        speed, "timed", lambda steps, rounds: {"FPO": 2.0, "SimPO": 1.0, "mlx-lm SFT": 9.0}
    )
    assert "FPO / SimPO" in wrong(speed.lines(SMALL, gpu=True))


def test_a_product_of_rounded_factors_is_found(monkeypatch):
    assert float_bits() == 23
    monkeypatch.setattr(mx, "full", lambda shape, value: mx.ones(shape))  # as TF32 would round it
    assert float_bits() == 10


def test_the_cpu_is_in_force_inside_and_the_device_again_after():
    with device.using(under_test()):
        with on_cpu():
            assert device.here().kind == "cpu"
        assert device.here().gpu


def test_the_real_size_is_a_published_models():
    heads = (REAL.heads, REAL.kv_heads, REAL.hidden // REAL.heads)
    assert (REAL.hidden, REAL.inner, REAL.vocab, heads) == (2048, 8192, 128_256, (32, 8, 64))


def without_parts(monkeypatch, size, **parts):
    """The check of a GPU of this size, in bytes, with no parts but these; what each was given."""
    given = {}

    def part(name):
        def lines(*words, **named):
            given[name] = (*words, *named.values())
            yield from parts[name]() if name in parts else ()

        return lines

    for module in (kernels, launches, speed):
        monkeypatch.setattr(module, "lines", part(module.__name__.rpartition(".")[2]))
    for name in ("backbones", "starts", "updates"):
        monkeypatch.setattr(runs, name, part(name))
    monkeypatch.setattr(device, "memory", lambda: size)
    with device.using(device.gpu("metal", size)):
        return device_check.check_device(), given


@pytest.mark.parametrize(("memory", "small"), [(5.7e9, True), (11.5e9, False)])
def test_a_gpu_without_the_memory_for_the_real_size_takes_the_small_one_and_says_so_first(
    monkeypatch, memory, small
):
    """Metal gives MLX 5.7 GB of a Mac of 8, and the real size takes up to 9.5."""
    found, given = without_parts(monkeypatch, memory)
    assert given["kernels"] == (SMALL if small else REAL,)
    assert given["speed"] == (given["kernels"][0], not small)  # times of tiny shapes have no bound
    assert found.size == ("small" if small else "real")
    assert [line.text for line in found.lines] == small * [
        "5.7 GB [under 10 GB: small shapes, whose times say little]"
    ]


@pytest.mark.parametrize("refusal", [RuntimeError, ModelError, Diverged])
def test_what_mlx_or_a_run_refuses_is_a_finding_and_the_other_parts_go_on(monkeypatch, refusal):
    """A training that diverges on a device ended the whole check, and no file was written."""
    fine = Line("kernels", "KL", 0.0, 1.0)

    def full():
        yield fine
        raise refusal(f"[malloc] Unable to allocate 9 bytes. {Path.home()}/x")

    found, _ = without_parts(monkeypatch, 2e10, kernels=full, speed=lambda: [fine])
    told = found.as_dict()["findings"]
    assert [one["verdict"] for one in told] == ["ok", "WRONG", "ok"]
    assert told[1]["name"] == "kernels, ended early"
    assert told[1]["note"] == "[malloc] Unable to allocate 9 bytes. ~/x"
    assert found.wrong == 1


def test_the_file_says_what_ran_and_nothing_of_its_user(monkeypatch):
    one = Line("kernels", "KL", 2.0, 1.0)
    for module in (kernels, launches):
        monkeypatch.setattr(module, "lines", lambda *_: iter([one]))
    for name in ("backbones", "starts", "updates"):
        monkeypatch.setattr(runs, name, lambda *_: iter(()))
    monkeypatch.setattr(speed, "lines", lambda *_, **__: iter(()))
    seen = []
    found = device_check.check_device(show=seen.append)
    assert seen == [one, one]
    told = found.as_dict()
    assert (told["size"], told["gpu"], told["wrong"]) == ("small", False, 2)
    assert told["note"] == device_check.NO_GPU
    assert {"mlx", "mlx-lm", "fpo-mlx", "system", "device", "memory_bytes"} <= set(told["machine"])
    text = json.dumps(told)
    assert "/" not in text.replace("|u| / beta", "")
    assert not {getpass.getuser(), platform.node()} & set(text.split('"'))
