"""What a GPU cannot do is said in plain words, with what this command can do about it."""

from __future__ import annotations

import pytest
from command_line import refused, run

from fpo_mlx import pipeline
from fpo_mlx.cli import trouble
from fpo_mlx.machine import upstream

# as MLX 0.32 throws them, with Metal's and CUDA's own words
RAN = "[METAL] Command buffer execution failed: "
FULL = (
    f"{RAN}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "[malloc] Unable to allocate 17179869184 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
)
LONG = (
    f"{RAN}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    f"{RAN}Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
)
ABSENT = (
    "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, "
    "or virtualized macOS sessions where the GPU is not accessible."
)


def raising(text):
    def fail(*_, **__):
        raise RuntimeError(text)

    return fail


def train(folder, monkeypatch, text):
    monkeypatch.setattr(pipeline, "train", raising(text))
    words = ("--model", "m", "--data", "d", "--objective", "dpo", "--adapter-path", folder / "out")
    return run("train", *words)


@pytest.mark.parametrize("text", FULL)
def test_a_full_memory_in_training_names_what_takes_less_and_how_to_go_on(
    tmp_path, monkeypatch, text
):
    parts = (
        text.rstrip("."), "memory is full", "`fpo-mlx plan`", "Close other programs",
        "--micro-batch-size 1, --grad-checkpoint", "checkpoint is whole: --resume",
    )  # fmt: skip
    refused(train(tmp_path, monkeypatch, text), 1, *parts)


@pytest.mark.parametrize("text", LONG)
def test_a_step_that_macos_ended_names_what_makes_it_shorter(tmp_path, monkeypatch, text):
    done = train(tmp_path, monkeypatch, text)
    refused(done, 1, "kept the GPU for too long", "--grad-checkpoint", "display sleep", "--resume")
    assert "memory is full" not in done.stderr


def test_advice_names_only_what_the_command_has(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "compare", raising(FULL[0]))
    done = run("compare", "--model", "m", "--prompt", "p", "--adapter-path", tmp_path)
    refused(done, 1, "memory is full", "a smaller --max-seq-length")
    assert "--resume" not in done.stderr
    assert "--grad-checkpoint" not in done.stderr


def test_commands_that_go_on_by_themselves_say_so():
    said = trouble.plain(RuntimeError(FULL[0]), "rounds", {"config"})
    assert said is not None
    assert str(said).endswith("the same command goes on.")


@pytest.mark.parametrize("text", [FULL[0], LONG[0]])
def test_an_sae_in_training_is_told_of_tokens_and_that_other_sizes_are_another_run(
    tmp_path, monkeypatch, text
):
    monkeypatch.setattr(pipeline, "sae_train", raising(text))
    done = run("sae", "train", "--model", "m", "--data", "d", "--output", tmp_path / "out")
    refused(done, 1, "a smaller --micro-batch-size (tokens)", "--width", "--resume goes on from it")
    assert ("--memory-gb" in done.stderr) is (text in FULL)
    assert "--micro-batch-size 1" not in done.stderr
    assert "`fpo-mlx plan`" not in done.stderr
    assert done.stderr.strip().endswith("none of these may change there.")


@pytest.mark.parametrize(
    ("command", "plan"),
    [
        ("train", "`fpo-mlx plan`"), ("precompute", "`fpo-mlx plan`"),
        ("pairs generate", "`fpo-mlx pairs plan`"), ("pairs judge", "`fpo-mlx pairs plan`"),
        ("chat", None), ("compare", None), ("sae train", None), ("sae evaluate", None),
    ],
)  # fmt: skip
def test_a_plan_is_named_only_where_it_counts_what_the_command_takes(command, plan):
    said = str(trouble.plain(RuntimeError(FULL[0]), command, set()))
    assert (f"{plan} says beforehand" in said) if plan else ("plan" not in said)


def test_where_the_session_has_no_metal_it_is_said_where_to_run(monkeypatch):
    monkeypatch.setattr(pipeline, "cache_info", raising(ABSENT))
    refused(run("cache", "info", "x"), 1, "No Metal device available", "plain Terminal")


@pytest.mark.parametrize("text", [f"{RAN}Page Fault", "[matmul] shapes", "out of memory"])
def test_any_other_error_keeps_its_traceback(monkeypatch, text):
    monkeypatch.setattr(pipeline, "cache_info", raising(text))
    assert str(run("cache", "info", "x").exception) == text
    assert upstream.trouble(RuntimeError(text)) is None
