"""What fits into a memory: the peak of a whole training, and which settings would lower it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fpo_mlx.machine.memory import (
    Lengths,
    ModelShape,
    SaeShape,
    Setup,
    Term,
    Tiles,
    total,
    train_terms,
)


@dataclass(frozen=True)
class Case:
    """Everything that a prediction of `train` needs."""

    model: ModelShape
    saes: tuple[SaeShape, ...]
    setup: Setup
    tiles: Tiles
    lengths: tuple[Lengths, ...]  # of the pairs; the heaviest decides
    fixed: frozenset[str] = frozenset()  # settings that this run cannot change
    data: float = 0.0  # bytes that all pairs hold, beside what MLX allocates

    def terms(self) -> list[Term]:
        every = (
            train_terms(self.model, self.saes, self.setup, self.tiles, lengths)
            for lengths in set(self.lengths)
        )
        return max(every, key=total)

    @property
    def peak(self) -> float:
        """What MLX is to allocate."""
        return total(self.terms())

    @property
    def need(self) -> float:
        """What has to fit into memory."""
        return self.peak + self.data

    def cut(self, longest: int) -> Case:
        """The same with every response cut as --max-seq-length cuts it."""
        return replace(self, lengths=tuple({_cut(pair, longest) for pair in self.lengths}))


def _cut(pair: Lengths, longest: int) -> Lengths:
    prompt = min(pair.prompt, longest - 1)
    room = longest - prompt
    return Lengths(prompt, min(pair.chosen, room), min(pair.rejected, room))


def heaviest(lengths: Sequence[Lengths], count: int = 50) -> tuple[Lengths, ...]:
    """The pairs that can decide the peak: of the most tokens, longest prompts, longest sequences.

    Side by side both responses are padded to the longer one, so one long answer may decide it.
    """
    ways = (lambda pair: pair.tokens, lambda pair: pair.prompt, lambda pair: pair.longest)
    return tuple({pair for way in ways for pair in sorted(set(lengths), key=way)[-count:]})


@dataclass(frozen=True)
class Change:
    """flags: all that it takes, those of changes that it builds on first; note: what it costs."""

    flags: tuple[str, ...]
    note: str
    case: Case

    def __str__(self) -> str:
        return f"{' '.join(self.flags)} ({self.note})"


def changes(case: Case) -> list[Change]:
    """What could be changed to need less memory, the least painful first."""
    now = Change((), "", case)
    found = _same_result(now)
    given = case.setup.grad_checkpoint
    whole = next((one for one in found if one.case.setup.grad_checkpoint == given), now)
    base = found[-1] if found else now
    others = [*_without_backward(whole), *_other_runs(base)]
    return [*found, *(one for one in others if one.case.peak < case.peak)]


def way_out(case: Case, memory: float) -> Change | None:
    """The first of `changes` that fits."""
    return next((one for one in changes(case) if one.case.need <= memory), None)


def _same_result(now: Change) -> list[Change]:
    """Each builds on those before it; one that saves nothing is left out."""
    found, note = [], "slower, the same result"
    for name, flag, value, useful in (
        ("micro_batch_size", "--micro-batch-size 1", 1, now.case.setup.micro_batch_size > 1),
        ("grad_checkpoint", "--grad-checkpoint", True, not now.case.setup.forward),
    ):
        if not useful or name in now.case.fixed:
            continue
        case = replace(now.case, setup=replace(now.case.setup, **{name: value}))
        if case.peak < now.case.peak:
            now = Change((*now.flags, flag), note, case)
            found.append(now)
    return found


def _without_backward(base: Change) -> list[Change]:
    """In the place of checkpoints."""
    if base.case.setup.forward or "gradient" in base.case.fixed:
        return []
    case = replace(base.case, setup=replace(base.case.setup, forward=True))
    note = "the memory of inference, many more updates"
    return [Change((*base.flags, "--gradient forward"), note, case)]


def _other_runs(base: Change) -> list[Change]:
    """What trains something else: fewer blocks, or shorter responses."""
    case, found = base.case, []
    if "num_layers" not in case.fixed:
        found += [
            Change((*base.flags, f"--num-layers {n}"), "fewer adapted blocks", fewer(case, n))
            for n in (8, 4, 2)
            if n < case.setup.adapted_blocks
        ]
    if "max_seq_length" not in case.fixed:
        found += [
            Change((*base.flags, f"--max-seq-length {n}"), "cuts what is longer", case.cut(n))
            for n in (2048, 1024, 512, 256)
            if n < max(pair.longest for pair in case.lengths)
        ]
    return found


def fewer(case: Case, blocks: int) -> Case:
    """The same with adapters on at most so many blocks."""
    setup = case.setup
    now = setup.adapted_blocks
    blocks = min(blocks, now)
    smaller = replace(
        setup,
        first_adapted=setup.last_adapted + 1 - blocks,
        adapter_parameters=setup.adapter_parameters * blocks // now,
        adapted=setup.adapted.part(blocks / now),
    )
    return replace(case, setup=smaller)


def largest_micro_batch(case: Case, memory: float) -> int:
    """The most pairs at once that fit, 0 where not even one does; never more than a process has."""

    def fits(n: int) -> bool:
        return replace(case, setup=replace(case.setup, micro_batch_size=n)).need <= memory

    return _largest(fits, case.setup.most_at_once)


def longest_sequence(case: Case, memory: float, most: int = 1 << 17) -> int:
    """The longest prompt + response, half of it prompt, that fits."""

    def fits(n: int) -> bool:
        half, rest = max(1, n // 2), max(1, n - n // 2)
        return replace(case, lengths=(Lengths(half, rest, rest),)).need <= memory

    return _largest(fits, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n <= most with fits(n), for a `fits` that ends once; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
