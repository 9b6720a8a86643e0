"""What to do where the device could not do a command's work, by the options that it has."""

from __future__ import annotations

from collections.abc import Collection

from fpo_mlx.errors import FpoError
from fpo_mlx.machine import upstream

# by an option's name: what makes one step smaller
SMALLER = {
    "micro_batch_size": "--micro-batch-size 1", "grad_checkpoint": "--grad-checkpoint",
    "rows": "fewer --rows", "max_seq_length": "a smaller --max-seq-length",
}  # fmt: skip
RESUMES = "train"  # also of `sae train`
GO_ON = ("rounds", "precompute", "generate", "judge")  # without any option that says so


def plain(error: RuntimeError, command: str, options: Collection[str]) -> FpoError | None:
    """The error for what MLX could not do on this device; None for any other.

    command, options: names, which decide what there is to do about it.
    """
    kind = upstream.trouble(error)
    if kind is None:
        return None
    said = str(error).strip().rstrip(".")
    if kind == "absent":
        return FpoError(f"{said}. {upstream.NO_SESSION}")
    other = {"max_seq_length"} if command == RESUMES else set()  # it would be another run
    smaller = [words for name, words in SMALLER.items() if name in options and name not in other]
    if kind == "memory":
        found = "The device's memory is full"
        first = "Close other programs; `fpo-mlx plan` says beforehand what a run takes."
        less = "It takes less with"
    else:
        found = "macOS ended a step that kept the GPU for too long"
        first = "Let the display sleep while the command runs."
        less = "Steps are shorter with"
    steps = [first, *([f"{less} {', '.join(smaller)}."] if smaller else [])]
    return FpoError(" ".join([f"{found}: {said}.", *steps, *_going_on(command, options)]))


def _going_on(command: str, options: Collection[str]) -> list[str]:
    if command == RESUMES:
        free = "grad_checkpoint" in options
        may = ", and may take --grad-checkpoint, but no other --micro-batch-size" if free else ""
        return [f"The last checkpoint is whole: --resume goes on from it{may}."]
    return ["What is done is whole: the same command goes on."] if command in GO_ON else []
