"""Several processes train one thing: each sees its own part of an update, all know all figures.

Started by mlx.launch. What is summed is the same on every process, to the bit, so all of them
decide alike (guard, best, stop) without asking each other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.machine.processes import find_share

PATIENCE = 600.0  # seconds
BLOCK = 1 << 26  # bytes of a file that one message holds


@dataclass(frozen=True)
class Part:
    """Positions of one process's pairs within a list; idle: it has none, and borrows the first."""

    positions: np.ndarray  # int64 [n], n >= 1
    idle: bool = False


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. Alone, nothing is sent and nothing is changed.

    patience: seconds that a message may take. A process that is gone is noticed at once; one that
    hangs, or whose machine lost its power, when the patience ends.
    Every method but `part` has to be called by all processes in the same order, and raises FpoError
    when another one is gone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    patience: float = PATIENCE

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def part(self, count: int) -> Part:
        """The positions of this process among `count`: every `size`-th one."""
        positions = np.arange(self.rank, count, self.size)
        return Part(positions) if len(positions) else Part(np.zeros(1, np.int64), idle=True)

    def sum(self, tree: Any) -> Any:
        """The sum over all processes of a tree of arrays of one dtype, the same tree on each."""
        if self.size == 1:
            return tree
        flat = cast("list[tuple[str, mx.array]]", tree_flatten(tree))
        total = self._sum(mx.concatenate([array.reshape(-1) for _, array in flat]))
        ends = np.cumsum([array.size for _, array in flat])[:-1].tolist()
        parts = mx.split(total, ends)
        named = zip(flat, parts, strict=True)
        return tree_unflatten([(name, part.reshape(old.shape)) for (name, old), part in named])

    def gather(
        self, values: Mapping[str, np.ndarray], part: Part, count: int
    ) -> dict[str, np.ndarray]:
        """The values of all `count` pairs, in order. values: [n] each, of this process's part."""
        if self.size == 1:
            return dict(values)
        table = np.zeros((len(values), count), np.float32)
        if not part.idle:
            table[:, part.positions] = np.stack(list(values.values()))
        everywhere = np.array(self._sum(mx.array(table)))
        return dict(zip(values, everywhere, strict=True))

    def first_number(self, number: float) -> float:
        """The first process's number, to the bit."""
        if self.size == 1:
            return number
        (own,) = self.from_first([mx.array(np.frombuffer(np.float64(number).tobytes(), np.uint8))])
        return float(np.frombuffer(np.array(own).tobytes(), np.float64)[0])

    def all_say(self, text: str) -> bool:
        """Whether the text is the same on all of them."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "little")
        return self.largest(number) == -self.largest(-number)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        seen = mx.distributed.all_max(mx.array([number], mx.int32), group=self.group)
        return cast(int, self._wait(seen).item())

    def from_first(self, tree: Any) -> Any:
        """The first process's tree, on each. Shapes and dtype have to be the same on all."""
        if self.size == 1 or self.first:
            return self.sum(tree)
        flat = cast("list[tuple[str, mx.array]]", tree_flatten(tree))
        return self.sum(tree_unflatten([(name, mx.zeros_like(array)) for name, array in flat]))

    @contextmanager
    def file_of_first(self, path: Path) -> Iterator[Path]:
        """A path to the content of the first process's file: on each machine one of its own."""
        if self.size == 1:
            yield path
            return
        if self.first:
            self._send(path)
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="fpo-mlx-") as folder:
            copy = Path(folder) / path.name
            with open(copy, "wb") as out:
                for block in self._blocks(0):
                    out.write(block)
            yield copy

    def _send(self, path: Path) -> None:
        with open(path, "rb") as data:
            for _ in self._blocks(path.stat().st_size, data):
                pass

    def _blocks(self, size: int, data: BinaryIO | None = None) -> Iterator[bytes]:
        """The bytes of the first process's file, in blocks: a checkpoint can have gigabytes.

        size, data: of that file; nothing on the others.
        """
        whole, rest = (self.largest(number) for number in divmod(size, BLOCK))
        for length in [BLOCK] * whole + [rest] * bool(rest):
            own = np.zeros(length, np.uint8)
            if data is not None:
                own = np.frombuffer(data.read(length), np.uint8)
            yield np.array(self._sum(mx.array(own))).tobytes()

    def share_folder(self, folder: Path) -> bool:
        """Whether all processes see one and the same folder of this name."""
        if self.size == 1:
            return True
        word = self.largest(int.from_bytes(os.urandom(3), "little") if self.first else 0)
        probe = folder / f".probe-{word}"
        if self.first:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        self.largest(0)  # it is there now
        missing = self.largest(int(not probe.exists()))
        if self.first:
            probe.unlink(missing_ok=True)
        return not missing

    def _sum(self, array: mx.array) -> mx.array:
        return self._wait(mx.distributed.all_sum(array, group=self.group))

    def _wait(self, array: mx.array) -> mx.array:
        """Evaluate what came from the others, for no longer than the patience."""
        longest = min(self.patience, threading.TIMEOUT_MAX)  # --peer-timeout inf: never
        timer = threading.Timer(longest, _give_up, [self.rank, self.patience])
        timer.daemon = True
        timer.start()
        try:
            mx.eval(array)
        except RuntimeError as error:  # the ring: a closed socket
            raise FpoError(
                f"Process {self.rank} of {self.size} lost another process of this run ({error}). "
                "The last checkpoint is whole: start all of them again with --resume."
            ) from error
        finally:
            timer.cancel()
        return array


def _give_up(rank: int, patience: float) -> None:
    """Nothing but the end of the process gets it out of a message that never comes."""
    text = (
        f"fpo-mlx: process {rank} has heard nothing from the others for {patience:g} seconds "
        "(--peer-timeout) and ends. The last checkpoint is whole: start all of them again with "
        "--resume.\n"
    )
    os.write(2, text.encode())
    os._exit(FpoError.exit_code)


def open_ranks(
    environment: Mapping[str, str] = os.environ,
    *,
    count: int = 0,
    what: str = "--batch-size",
    command: str = "train",
    patience: float = PATIENCE,
) -> Ranks:
    """This process's place, as the launcher set it.

    count: of what an update is made of, over all processes; what: the settings that make it.
    Raises: ConfigError when another launcher was used, the count cannot be dealt out evenly, or the
    others cannot be reached.
    """
    share = find_share(environment)
    if share.world == 1:
        return Ranks()
    if count % share.world:
        raise ConfigError(
            f"{what} is {count}, which {share.world} processes cannot divide evenly. "
            f"Give a multiple of {share.world}."
        )
    if "RANK" in environment and "MLX_RANK" not in environment:
        raise ConfigError(
            f"Training with {share.world} processes needs `mlx.launch -n {share.world} -- fpo-mlx "
            f"{command} …`; torchrun and accelerate serve `precompute` only."
        )
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"MLX cannot connect process {share.rank} of {share.world} with the others ({error}). "
            "Check the hostfile and that its addresses and ports can be reached."
        ) from error
    if group.size() != share.world:
        raise ConfigError(
            f"The launcher speaks of {share.world} processes, MLX of {group.size()}. "
            f"Start with `mlx.launch -n N -- fpo-mlx {command} …`."
        )
    return Ranks(group.rank(), group.size(), group, patience)
