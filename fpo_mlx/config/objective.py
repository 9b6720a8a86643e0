"""The objective as a point of one family, and the named points of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fpo_mlx.config.fields import is_number, out_of_bounds, refuse, setting


@dataclass(frozen=True)
class Objective:
    """One point of the family of `core.objectives`; table of presets: docs/objective.md."""

    beta: float = setting(
        0.1, "strength of the preference term", "objective", above=0, below=math.inf
    )
    alpha: float = setting(
        0.5,
        "strength of the constraint, relative to beta",
        "objective",
        first=True,
        least=0,
        below=math.inf,
    )
    gamma: float = setting(
        0.0, "constant margin: u = beta * difference - gamma", "objective", below=math.inf
    )
    score_margin: float = setting(
        0.0,
        "margin per point that score_chosen is above score_rejected, taken from u",
        "objective",
        below=math.inf,
    )
    link: Literal["sigmoid", "ipo", "hinge", "ada", "sail", "apo-zero", "apo-down", "each"] = (
        setting("sigmoid", "how u becomes a loss", "objective")
    )
    link_parameters: dict = setting(
        {}, "ada: tau_min, tau_max, rho; sail: rho, share", "objective", yaml_only=True
    )
    preference_weight: float = setting(
        1.0, "weight of the preference term; 0 for none", "objective", least=0, below=math.inf
    )
    nll_weight: float = setting(
        0.0,
        "weight of -log p of the chosen response, per token: keeps it alive",
        "objective",
        first=True,
        least=0,
        below=math.inf,
    )
    label_smoothing: float = setting(
        0.0,
        "share of the labels that are taken to be wrong, below 0.5",
        "objective",
        least=0,
        below=0.5,
    )
    robust_smoothing: bool = setting(
        False, "label smoothing that undoes flips instead of hedging", "objective"
    )
    wpo: bool = setting(False, "weigh a pair by how likely the policy is to write it", "objective")
    length_normalize: bool = setting(True, "divide log-probs by the response's length", "objective")
    log_odds: bool = setting(
        False, "compare log-odds of the mean token log-prob in place of log-probs", "objective"
    )
    margin: Literal["reference", "constant"] = setting(
        "reference", "margin of the objective", "objective"
    )
    constraint: Literal["none", "features", "activations", "kl"] = setting(
        "features", "what is held near the reference", "objective"
    )
    stop_gradient: bool = setting(
        True, "no gradient through the chosen response's constraint", "objective"
    )
    top_k: int = setting(
        50, "features of each side that the distance looks at", "objective", above=0
    )
    feature_scale: Literal["raw", "reference"] = setting(
        "raw",
        "raw: the paper's D; reference: D over the mean square of the reference's top-k",
        "objective",
    )
    target_drift: float | None = setting(
        None,
        "find alpha while training so that features move by this part of their size, such as 0.3",
        "objective",
        first=True,
        instead_of="target_kl",
        least=1e-6,
        most=1e6,
    )
    target_kl: float | None = setting(
        None,
        "find alpha while training so that the rejected responses' KL is so many nats",
        "objective",
        instead_of="target_drift",
        least=1e-6,
        most=1e6,
    )
    feature_weights: str | None = setting(
        None,
        "file of feature: weight; these are held so much on both responses; 0 frees a feature",
        "objective",
        path=True,
        may_change=True,
    )

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        if self.preference_weight == 0 and self.nll_weight == 0:
            faults.append(
                "--preference-weight and --nll-weight are both 0: nothing would be trained."
            )
        faults += _link_faults(self.link, self.link_parameters, self.link_arguments)
        if self.target_drift is not None and not self.pooled:
            faults.append(
                f"--target-drift needs a constraint on features or activations, found "
                f"--constraint {self.constraint}. Use --objective fpo, or --target-kl with a KL "
                "constraint."
            )
        if self.target_kl is not None and self.constraint != "kl":
            faults.append(
                f"--target-kl needs --constraint kl (tdpo1, tdpo2, simpo-kl), found "
                f"{self.constraint}."
            )
        refuse(faults)

    @property
    def link_arguments(self) -> Mapping[str, float]:
        """What the link takes beside u and beta."""
        return {**LINK_PARAMETERS.get(self.link, {}), **self.link_parameters}

    @property
    def judged_alpha(self) -> float:
        """Alpha of losses that judge: 0 with a target, where every update has another one."""
        return 0.0 if self.target_drift or self.target_kl else self.alpha

    def held_by(self, constraint: str) -> Objective:
        """The same with that constraint, and no target of one."""
        return replace(self, constraint=constraint, target_drift=None, target_kl=None)

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


LINK_PARAMETERS: dict[str, dict[str, float]] = {  # the papers' own
    "ada": {"tau_min": 0.1, "tau_max": 4.0, "rho": 0.1},
    "sail": {"rho": 0.2, "share": 0.4},
}


def _link_faults(link: str, given: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """What is wrong with link_parameters: names that the link does not take, impossible values."""
    known = LINK_PARAMETERS.get(link, {})
    if unknown := sorted(set(map(str, given)) - set(known)):
        wanted = f"wanted {', '.join(known)}" if known else f"--link {link} takes none"
        return [f"link_parameters: unknown {', '.join(unknown)}; {wanted}."]
    wanted = ""
    if not all(is_number(value) and value > 0 for value in used.values()):
        wanted = "numbers above 0"
    elif link == "ada" and not (used["tau_min"] <= used["tau_max"] and used["rho"] < math.log(2)):
        wanted = "tau_min <= tau_max and rho below ln 2"
    elif link == "sail" and used["share"] > 1:
        wanted = "a share of 1 at most"
    return [f"link_parameters {dict(given)}: wanted {wanted}."] if wanted else []


_SUMS = {"length_normalize": False, "constraint": "none"}  # DPO and what differs by its link
_NO_REFERENCE = {"margin": "constant", "constraint": "none", "nll_weight": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "fpo": {},
    "dpo": _SUMS,
    "simpo": {"margin": "constant", "constraint": "none", "beta": 2.0, "gamma": 1.0},
    "simpo-kl": {"margin": "constant", "constraint": "kl", "beta": 2.0, "gamma": 1.0},
    "tdpo1": {"length_normalize": False, "constraint": "kl", "alpha": 1.0, "stop_gradient": False},
    "tdpo2": {"length_normalize": False, "constraint": "kl"},
    "ipo": {"link": "ipo", "constraint": "none"},
    "hinge": {"link": "hinge", **_SUMS},
    "apo-zero": {"link": "apo-zero", **_SUMS},
    "apo-down": {"link": "apo-down", **_SUMS},
    "ada-dpo": {"link": "ada", **_SUMS},
    "sail-ddp": {"link": "sail", **_SUMS},
    "cpo": {"length_normalize": False, **_NO_REFERENCE},
    "orpo": {"log_odds": True, "beta": 1.0, "preference_weight": 0.1, **_NO_REFERENCE},
    "asft": {
        "log_odds": True, "beta": 1.0, "preference_weight": 0.1, "link": "each", **_NO_REFERENCE,
    },
    "sft": {"preference_weight": 0.0, **_NO_REFERENCE},
}  # fmt: skip
