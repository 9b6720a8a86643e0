"""What `forked` imports once; nothing is computed."""

import importlib
import sys

from fpo_mlx import machine

sys.modules["torch"] = None  # type: ignore[assignment]  # no command in a fork takes it: not installed

machine.set_up()
for name in (
    "mlx_lm.models.llama", "mlx_lm.utils", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "fpo_mlx.cli", "fpo_mlx.judge.evaluate", "fpo_mlx.reference.mlx_backend",
    "fpo_mlx.train.trainer",
):  # fmt: skip
    importlib.import_module(name)
