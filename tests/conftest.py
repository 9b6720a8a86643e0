"""Before any test imports MLX."""

from fpo_mlx import blas

blas.preload()
