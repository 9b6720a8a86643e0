"""Pure array functions: no model, no files, no settings objects."""

from fpo_mlx import blas

blas.preload()  # before the first import of mlx.core
