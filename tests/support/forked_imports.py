"""What `forked` imports once; nothing is computed."""

import importlib

from fpo_mlx import machine

machine.set_up()
for name in (
    "mlx_lm.models.llama", "mlx_lm.utils", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",  # where torch is, half of a start
    "fpo_mlx.cli", "fpo_mlx.judge.evaluate", "fpo_mlx.reference.mlx_backend",
    "fpo_mlx.train.trainer",
):  # fmt: skip
    importlib.import_module(name)
