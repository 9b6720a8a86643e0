"""FPO for Apple silicon: preference tuning held in place by sparse-autoencoder features."""

__version__ = "0.2.0"
