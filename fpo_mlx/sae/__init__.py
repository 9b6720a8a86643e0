"""Public SAEs, as they lie on disk, to the one canonical record `SaeWeights`."""

from fpo_mlx.sae.load import FORMATS, load_sae, sniff

__all__ = ["FORMATS", "load_sae", "sniff"]
