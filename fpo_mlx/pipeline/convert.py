"""A hub model to a (quantised) MLX folder, by mlx-lm."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path

from fpo_mlx.errors import ConfigError, ModelError
from fpo_mlx.storage import files, outputs
from fpo_mlx.storage.hub import TERMS, published, resolve_model


def convert(
    hf_path: str,
    mlx_path: Path,
    *,
    quantize: bool,
    q_bits: int | None,
    q_group_size: int | None,
    dtype: str | None,
    trust_remote_code: bool,
    overwrite: bool = False,
) -> Path:
    """Hand over to mlx_lm.convert; the folder appears when it is whole.

    Raises: ConfigError when mlx_path would lose something (`storage.outputs`), or for numbers of a
    quantisation that was not asked for; ModelError when mlx-lm cannot convert the model.
    """
    from mlx_lm.convert import convert as mlx_convert

    from fpo_mlx.model import card

    for flag, value in (("--q-bits", q_bits), ("--q-group-size", q_group_size)):
        if value is not None and not quantize:
            raise ConfigError(
                f"{flag} {value}: nothing is quantised without --quantize (-q). Give both."
            )

    def claim(base: Path | None = None) -> Path:
        made, inputs = outputs.model_made_from(base), [base or hf_path]
        return outputs.claim_folder(
            mlx_path, "--mlx-path", made, inputs=inputs, overwrite=overwrite
        )

    mlx_path = claim()  # before a download
    source = resolve_model(hf_path)
    claim(source)
    with files.atomic_folder(mlx_path, partial(claim, source)) as folder:
        folder.rmdir()  # mlx-lm makes it itself, and refuses one that is there
        try:
            with contextlib.redirect_stdout(sys.stderr):
                mlx_convert(
                    str(source), str(folder), quantize=quantize, q_group_size=q_group_size,
                    q_bits=q_bits, dtype=dtype, trust_remote_code=trust_remote_code,
                )  # fmt: skip
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise files.unwritable(mlx_path, error) or ModelError(
                f"{hf_path} cannot be converted: {error}"
            ) from error
        card.copy_beside(folder, source, TERMS)
        card.put(folder, source, published(hf_path))
    return mlx_path
