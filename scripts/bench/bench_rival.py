"""mlx-lm-lora in a venv of its own, as a subject whose steps interleave with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_measure import Sample

from fpo_mlx.machine import blas
from fpo_mlx.records import TokenPair

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".bench" / "mlx-lm-lora"
PACKAGES = ("mlx-lm-lora==5.10.2", "mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4")
NAME = "mlx-lm-lora dpo"


def python(say: Callable[[str], None]) -> Path:
    """The venv's Python; made on the first call.

    Raises: subprocess.CalledProcessError when it cannot be installed.
    """
    found, stamp = VENV / "bin" / "python", VENV / "installed"
    if not stamp.exists():
        say(f"installing {PACKAGES[0]} into {VENV}")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        install = [str(found), "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(install, check=True, stdout=sys.stderr)
        stamp.write_text("\n".join(PACKAGES) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True)
class Rival:
    """A running loop; `facts` is what it said of itself."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    name: str = NAME

    def sample(self) -> Sample:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        values = _answer(self.process)
        return Sample(values["seconds"], None, int(values["peak"]))


@contextmanager
def running(
    model: Path, pair: TokenPair, lora: dict[str, Any], say: Callable[[str], None]
) -> Iterator[Rival]:
    """A process that trains on this one pair. lora: rank, scale, layers, learning_rate."""
    prompt = pair.prompt.tolist()
    job = {
        "chosen": prompt + pair.chosen.tolist(),
        "rejected": prompt + pair.rejected.tolist(),
        "prompt_length": len(prompt),
        **lora,
    }
    interpreter = python(say)
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "job.json", Path(folder) / "log"
        path.write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).with_name("bench_mlx_lm_lora.py")
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [str(interpreter), str(script), str(model), str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | _preload(),
            )  # fmt: skip
        try:
            yield Rival(process, _answer(process))
        except EOFError as error:
            tail = log.read_text(encoding="utf-8")[-3000:]
            raise SystemExit(f"{NAME} ended early:\n{tail}") from error
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(timeout=600)


def _preload() -> dict[str, str]:
    """The BLAS of this process, put in front of MLX's own there, too."""
    library = blas.preload().library
    return {"LD_PRELOAD": library} if library and library.startswith("libopenblas") else {}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError
    return json.loads(line)
