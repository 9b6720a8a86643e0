"""mlx-lm-lora's own DPO loop, one step per line of stdin, one JSON line each on stdout.

Runs inside the venv that `bench_rival.py` makes. Arguments: model folder, and a JSON file with
{"chosen", "rejected", "prompt_length", "rank", "scale", "layers", "learning_rate"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpo_mlx import machine
from fpo_mlx.machine import blas

machine.set_up()  # the same BLAS that we use


def main() -> None:
    folder, job = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the loop prints is no answer

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    import mlx.core as mx

    _no_metal(mx)
    import mlx.optimizers as optim
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model
    from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

    model, _ = load_model(folder)
    reference, _ = load_model(folder)  # its command line loads a second copy, too
    reference.freeze()
    model.freeze()
    lora = {"rank": job["rank"], "scale": job["scale"], "dropout": 0.0}
    linear_to_lora_layers(model, job["layers"], lora)
    answer({"gflops": _matmul_rate(mx), "blas": blas.preload().why})
    row = {
        "chosen": job["chosen"],
        "rejected": job["rejected"],
        "chosen_prompt_length": job["prompt_length"],
        "rejected_prompt_length": job["prompt_length"],
    }
    arguments = DPOTrainingArgs(
        batch_size=1, iters=1 << 30, steps_per_report=1, steps_per_save=1 << 30,
        max_seq_length=8192, adapter_file=os.devnull,
    )  # fmt: skip
    _wait(mx)
    train_dpo(
        model=model,
        ref_model=reference,
        optimizer=optim.Adam(learning_rate=job["learning_rate"]),
        train_dataset=[row],
        args=arguments,
        training_callback=_Callback(mx, answer),
    )


class _Callback:
    """Called after each step, outside its timing; holds the loop until the next line."""

    def __init__(self, mx: Any, answer: Any) -> None:
        self._mx, self._answer, self._first = mx, answer, True

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if self._first:  # the optimizer's state is new after it, so the loop compiles once more
            self._first = False
            self._mx.reset_peak_memory()
            return
        seconds, loss = 1.0 / info["iterations_per_second"], float(info["train_loss"])
        self._answer({"seconds": seconds, "peak": self._mx.get_peak_memory(), "loss": loss})
        _wait(self._mx)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        del info


def _wait(mx: Any) -> None:
    if not sys.stdin.readline():
        sys.stderr.flush()
        os._exit(0)  # the loop knows no other way to end early
    mx.clear_cache()
    mx.reset_peak_memory()


def _no_metal(mx: Any) -> None:
    """Without Metal its loop asks for a limit that is not there."""
    if mx.metal.is_available():
        return
    known = dict(mx.device_info())
    mx.device_info = lambda *_: {"max_recommended_working_set_size": 0, **known}
    mx.set_wired_limit = lambda _: 0


def _matmul_rate(mx: Any) -> float:
    a = mx.random.normal((1024, 1024))
    mx.eval(a @ a)
    started = time.perf_counter()
    mx.eval(a @ a)
    return 2 * 1024**3 / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
