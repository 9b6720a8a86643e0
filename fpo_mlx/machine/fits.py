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
    fresh: bool = True  # adapters by the settings; those of --init-adapter keep their blocks

    def terms(self) -> list[Term]:
        every = (
            train_terms(self.model, self.saes, self.setup, self.tiles, lengths)
            for lengths in set(self.lengths)
        )
        return max(every, key=total)

    @property
    def peak(self) -> float:
        return total(self.terms())

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


def changes(case: Case) -> list[tuple[str, Case]]:
    """What could be changed to need less memory, the least painful first."""
    setup, now = case.setup, case.peak
    ways: list[tuple[str, Case]] = []
    if setup.micro_batch_size > 1:
        case = replace(case, setup=replace(setup, micro_batch_size=1))
        ways.append(("--micro-batch-size 1 (slower, the same result)", case))
    if not case.setup.grad_checkpoint and not setup.forward:
        case = replace(case, setup=replace(case.setup, grad_checkpoint=True))
        ways.append(("--grad-checkpoint (slower, the same result)", case))
    if not setup.forward:
        way = replace(case, setup=replace(case.setup, forward=True))
        ways.append(("or --gradient forward (the memory of inference, many more updates)", way))
    now_adapted = setup.adapted_blocks
    ways += [
        (f"and {n} adapted blocks (--num-layers {n})", fewer(case, n))
        for n in (8, 4, 2)
        if case.fresh and n < now_adapted
    ]
    ways += [
        (f"and --max-seq-length {n} (cuts what is longer)", case.cut(n))
        for n in (2048, 1024, 512, 256)
        if n < max(pair.longest for pair in case.lengths)
    ]
    return [(name, way) for name, way in ways if way.peak < now]


def way_out(case: Case, memory: float) -> tuple[str, float] | None:
    """The first of `changes` that fits, with those that it builds on, and its peak."""
    base: list[str] = []
    for name, way in changes(case):
        own = name.removeprefix("or ").removeprefix("and ")
        if name.startswith("or "):  # in the place of checkpoints
            steps = [one for one in base if not one.startswith("--grad-checkpoint")]
        else:
            steps = base
        if way.peak <= memory:
            return " and ".join([*steps, own]), way.peak
        if own == name:
            base.append(name)
    return None


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
    """The most pairs at once that fit, 0 where not even one does; never more than an update's."""

    def fits(n: int) -> bool:
        return replace(case, setup=replace(case.setup, micro_batch_size=n)).peak <= memory

    return _largest(fits, case.setup.batch_size)


def longest_sequence(case: Case, memory: float, most: int = 1 << 17) -> int:
    """The longest prompt + response, half of it prompt, that fits."""

    def fits(n: int) -> bool:
        half, rest = max(1, n // 2), max(1, n - n // 2)
        return replace(case, lengths=(Lengths(half, rest, rest),)).peak <= memory

    return _largest(fits, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n <= most with fits(n), for a `fits` that ends once; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
