"""Starting several processes of fpo-mlx on this machine, as launchers do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def environment(**more: str) -> dict[str, str]:
    """This one's, without what a launcher would have set, and with this checkout's package."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        own.pop(name, None)
    return {**own, **QUIET, "PYTHONPATH": str(ROOT), **more}


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def launch(words: list[object], **more: str) -> subprocess.CompletedProcess:
    """Run to the end; stdin stays open, for mlx.launch spins on one that is not."""
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            [str(word) for word in words], stdin=reader, env=environment(**more),
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


def start_ring(codes: list[list[object]], hosts: Path) -> list[subprocess.Popen]:
    """A ring of processes without a launcher, so that none ends the others; words of each."""
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(codes))]))
    return [
        subprocess.Popen(
            [sys.executable, *(str(word) for word in words)], text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)),
        )
        for rank, words in enumerate(codes)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left running."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
