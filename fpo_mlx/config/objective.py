"""The objective as a point of one family, and the named points of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fpo_mlx.config.fields import check_finite, check_positive, setting
from fpo_mlx.errors import ConfigError


@dataclass(frozen=True)
class Objective:
    """One point of the family of `core.objectives`; table of presets: docs/objective.md."""

    beta: float = setting(0.1, "strength of the preference term", "objective")
    alpha: float = setting(
        0.5, "strength of the constraint, relative to beta", "objective", first=True
    )
    gamma: float = setting(0.0, "constant margin: u = beta * difference - gamma", "objective")
    length_normalize: bool = setting(True, "divide log-probs by the response's length", "objective")
    margin: Literal["reference", "constant"] = setting(
        "reference", "margin of the objective", "objective"
    )
    constraint: Literal["none", "features", "activations", "kl"] = setting(
        "features", "what is held near the reference", "objective"
    )
    stop_gradient: bool = setting(
        True, "no gradient through the chosen response's constraint", "objective"
    )
    top_k: int = setting(50, "features of each side that the distance looks at", "objective")
    feature_scale: Literal["raw", "reference"] = setting(
        "raw",
        "raw: the paper's D; reference: D over the mean square of the reference's top-k",
        "objective",
    )
    target_drift: float | None = setting(
        None,
        "find alpha while training so that features move by this part of their size, such as 0.1",
        "objective",
        first=True,
    )
    target_kl: float | None = setting(
        None,
        "find alpha while training so that the rejected responses' KL is so many nats",
        "objective",
    )
    feature_weights: str | None = setting(
        None,
        "file of feature: weight; these are held so much on both responses; 0 frees a feature",
        "objective",
        path=True,
        may_change=True,
    )

    def __post_init__(self) -> None:
        check_positive(self, "beta", "top_k")
        check_finite(self, "beta", "alpha", "gamma")
        if self.alpha < 0:
            raise ConfigError(f"--alpha {self.alpha}: wanted 0 or more.")
        check_positive(self, "target_drift", "target_kl")
        check_finite(self, "target_drift", "target_kl")
        if self.target_drift is not None and not self.pooled:
            raise ConfigError(
                f"--target-drift needs a constraint on features or activations, found "
                f"--constraint {self.constraint}. Use --objective fpo, or --target-kl with a KL "
                "constraint."
            )
        if self.target_kl is not None and self.constraint != "kl":
            raise ConfigError(
                f"--target-kl needs --constraint kl (tdpo1, tdpo2, simpo-kl), found "
                f"{self.constraint}."
            )

    @property
    def needs_sae(self) -> bool:
        return self.constraint == "features"

    @property
    def relative(self) -> bool:
        """Whether the loss takes D over the mean square of the reference's top-k."""
        return self.feature_scale == "reference" or self.target_drift is not None

    @property
    def pooled(self) -> bool:
        """Whether the constraint compares pooled vectors of a tapped site."""
        return self.constraint in ("features", "activations")


PRESETS: dict[str, dict[str, Any]] = {
    "fpo": {},
    "dpo": {"length_normalize": False, "constraint": "none"},
    "simpo": {"margin": "constant", "constraint": "none", "beta": 2.0, "gamma": 1.0},
    "simpo-kl": {"margin": "constant", "constraint": "kl", "beta": 2.0, "gamma": 1.0},
    "tdpo1": {"length_normalize": False, "constraint": "kl", "alpha": 1.0, "stop_gradient": False},
    "tdpo2": {"length_normalize": False, "constraint": "kl"},
}
