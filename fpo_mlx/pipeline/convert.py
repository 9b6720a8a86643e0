"""A hub model to a (quantised) MLX folder, by mlx-lm."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from fpo_mlx.errors import FpoError, ModelError
from fpo_mlx.storage import files
from fpo_mlx.storage.hub import resolve_model


def convert(
    hf_path: str,
    mlx_path: Path,
    *,
    quantize: bool,
    q_bits: int | None,
    q_group_size: int | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> Path:
    """Hand over to mlx_lm.convert; the folder appears when it is whole.

    Raises: FpoError when mlx_path exists, ModelError when mlx-lm cannot convert the model.
    """
    from mlx_lm.convert import convert as mlx_convert

    if mlx_path.exists():
        raise FpoError(f"{mlx_path} exists. Wanted a --mlx-path that does not, to write to.")
    source = resolve_model(hf_path)
    with files.atomic_folder(mlx_path) as folder:
        folder.rmdir()  # mlx-lm makes it itself, and refuses one that is there
        try:
            with contextlib.redirect_stdout(sys.stderr):
                mlx_convert(
                    str(source), str(folder), quantize=quantize, q_group_size=q_group_size,
                    q_bits=q_bits, dtype=dtype, trust_remote_code=trust_remote_code,
                )  # fmt: skip
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise files.unwritable(mlx_path, error) or ModelError(
                f"{hf_path} cannot be converted: {error}"
            ) from error
    return mlx_path
