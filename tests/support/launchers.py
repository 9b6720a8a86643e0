"""Starting several processes of fpo-mlx on this machine, as launchers do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from forked import QUIET, Forked

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = Path(__file__).with_name("without_torch")


def environment(*, torch: bool = True, **more: str) -> dict[str, str]:
    """This one's, without what a launcher would have set, and with this checkout's package.

    torch: whether there is one, where it is installed; without it a start is seconds shorter.
    """
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        own.pop(name, None)
    path = os.pathsep.join(map(str, (ROOT,) if torch else (ROOT, WITHOUT_TORCH)))
    return {**own, **QUIET, "PYTHONPATH": path, **more}


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def launch(words: list[object], *, torch: bool = False) -> subprocess.CompletedProcess:
    """Run to the end.

    stdin stays open and is full: mlx.launch hands it on, and keeps a processor busy with asking
    as long as it could write more to one of its processes, or where its own stdin is closed.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    try:
        return subprocess.run(
            [str(word) for word in words], stdin=reader, env=environment(torch=torch),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        os.close(reader)
        os.close(writer)


def mlx_launch(n: int, *words: object) -> list[object]:
    beside = Path(sys.executable).with_name("mlx.launch")
    program = beside if beside.exists() else shutil.which("mlx.launch")
    if program is None:
        pytest.skip("mlx.launch is not here")
    start = min(free_ports(8))
    return [
        program, "-n", n, "--backend", "ring", "--starting-port", start,
        "--python", sys.executable, "--", "-m", "fpo_mlx", *words,
    ]  # fmt: skip


def start_ring(codes: list[list[object]], hosts: Path) -> list[Forked]:
    """A ring of processes without a launcher, so that none ends the others; words of each."""
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(codes))]))
    return [
        forked.start(
            words,
            hosts.with_name(f"{hosts.stem}-{rank}"),
            environment(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)),
        )
        for rank, words in enumerate(codes)
    ]


def finish(processes: list[Forked], timeout: float = 240) -> list[tuple[int | None, str, str]]:
    """(exit code, stdout, stderr) of each; none is left running."""
    try:
        return [process.end(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
