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
SAE_TRAIN = "sae train"  # which counts in tokens, and resumes with no other sizes
TRAIN = "train"  # which resumes, too
GO_ON = ("rounds", "precompute", "pairs generate", "pairs judge")  # without an option that says so
PLANS = {
    "train": "plan", "precompute": "plan",
    "pairs generate": "pairs plan", "pairs judge": "pairs plan",
}  # fmt: skip


def plain(error: RuntimeError, command: str, options: Collection[str]) -> FpoError | None:
    """The error for what MLX could not do on this device; None for any other.

    command: as it is typed ("sae train"). options: names; both decide what there is to do about it.
    """
    kind = upstream.trouble(error)
    if kind is None:
        return None
    said = str(error).strip().rstrip(".")
    if kind == "absent":
        return FpoError(f"{said}. {upstream.NO_SESSION}")
    smaller = _smaller(command, options, kind)
    if kind == "memory":
        found = "The device's memory is full"
        plan = PLANS.get(command)
        ahead = f"; `fpo-mlx {plan}` says beforehand what a run takes" if plan else ""
        first = f"Close other programs{ahead}."
        less = "It takes less with"
    else:
        found = "macOS ended a step that kept the GPU for too long"
        first = "Let the display sleep while the command runs."
        less = "Steps are shorter with"
    steps = [first, *([f"{less} {', '.join(smaller)}."] if smaller else [])]
    return FpoError(" ".join([f"{found}: {said}.", *steps, *_going_on(command, options)]))


def _smaller(command: str, options: Collection[str], kind: str) -> list[str]:
    if command == SAE_TRAIN:
        fewer = ["--memory-gb"] if kind == "memory" else []
        return ["a smaller --micro-batch-size (tokens)", *fewer, "--width"]
    other = {"max_seq_length"} if command == TRAIN else set()  # it would be another run
    return [words for name, words in SMALLER.items() if name in options and name not in other]


def _going_on(command: str, options: Collection[str]) -> list[str]:
    if command == SAE_TRAIN:
        whole = "The last checkpoint is whole: --resume goes on from it"
        return [f"{whole}; none of these may change there."]
    if command == TRAIN:
        free = "grad_checkpoint" in options
        may = ", and may take --grad-checkpoint, but no other --micro-batch-size" if free else ""
        return [f"The last checkpoint is whole: --resume goes on from it{may}."]
    return ["What is done is whole: the same command goes on."] if command in GO_ON else []
