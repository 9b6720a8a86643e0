"""The language model: loading, taps, adapters, and the forward to response rows."""

from fpo_mlx import blas

blas.preload()  # before the first import of mlx.core
