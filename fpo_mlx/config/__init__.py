"""Every setting, its default and its check, once.

Command line beats YAML beats preset beats default. Unknown keys are errors.
"""

from fpo_mlx.config.engine import PARTS, coerce, is_other, load_config, load_section, read_yaml
from fpo_mlx.config.fields import COUNTABLE, GROUPS
from fpo_mlx.config.objective import PRESETS, Objective
from fpo_mlx.config.sae_training import SaeTrainConfig
from fpo_mlx.config.sections import (
    SECTIONS,
    ChatSampling,
    CompareSampling,
    DataConfig,
    ReferenceConfig,
    RunConfig,
    Sampling,
    default_of,
    named,
    options,
)
from fpo_mlx.config.training import TrainConfig

__all__ = [
    "COUNTABLE", "GROUPS", "PARTS", "PRESETS", "SECTIONS", "ChatSampling", "CompareSampling",
    "DataConfig", "Objective", "ReferenceConfig", "RunConfig", "SaeTrainConfig", "Sampling",
    "TrainConfig", "coerce", "default_of", "is_other", "load_config", "load_section", "named",
    "options", "read_yaml",
]  # fmt: skip
