"""FPO for Apple silicon: preference tuning held in place by sparse-autoencoder features."""

from fpo_mlx import blas, heap

__version__ = "0.1.0"

blas.preload()  # Linux only, and only useful before the first import of mlx.core
heap.keep_freed()
