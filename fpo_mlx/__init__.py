"""FPO for Apple silicon: preference tuning held in place by sparse-autoencoder features."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpo_mlx.api import FpoError as FpoError
    from fpo_mlx.api import Site as Site
    from fpo_mlx.api import encode as encode
    from fpo_mlx.api import judge_adapters as judge_adapters
    from fpo_mlx.api import open_model as open_model
    from fpo_mlx.api import read_cache as read_cache
    from fpo_mlx.api import read_sae as read_sae
    from fpo_mlx.api import read_settings as read_settings
    from fpo_mlx.api import score_pairs as score_pairs
    from fpo_mlx.api import train_adapters as train_adapters

__version__ = "0.2.0"
__all__ = [
    "FpoError", "Site", "__version__", "encode", "judge_adapters", "open_model", "read_cache",
    "read_sae", "read_settings", "score_pairs", "train_adapters",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public names, loaded when first asked for, so that `import fpo_mlx` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'fpo_mlx' has no attribute {name!r}")
    from fpo_mlx import api, machine

    machine.set_up()  # before anything imports mlx
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
