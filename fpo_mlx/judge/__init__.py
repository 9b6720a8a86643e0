"""Judging: held-out pairs, sampled answers, features that moved, how well an SAE fits."""

from typing import Literal, get_args

Sort = Literal["share_of_d", "effect_size", "change"]  # what "moved most" means of a feature
SORTS: tuple[str, ...] = get_args(Sort)
