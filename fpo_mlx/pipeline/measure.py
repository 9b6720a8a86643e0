"""By which objective adapters are judged: their training's, where the user named none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_mlx.config import Objective, RunConfig, load_config
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.origins import settings_of

HOLDS = ("constraint", "target_drift", "target_kl")  # what is held, which is no part of rewards


def as_trained(
    config: RunConfig,
    adapters: Sequence[str],
    say: Say,
    *,
    measure_kl: bool = True,
    way: str = "--objective",
) -> RunConfig:
    """The settings with the objective by which the adapters' run.json says they were trained.

    An objective that the user named stands, and so do single settings of one. Where adapters were
    trained by other rewards than each other, all are judged by the settings as they are. A
    constraint that would need more than was given here (a place for activations, the pass for the
    KL) is left out: it is in the loss, and in no reward. What is used is said, with the user's
    `way` to another.
    """
    if "objective" in config.asked:
        return config
    known: dict[str, RunConfig] = {}
    for adapter in dict.fromkeys(adapters):
        if "objective" in (settings := settings_of(adapter)):
            try:
                known[adapter] = _with_objective(config, settings, measure_kl)
            except ConfigError as error:
                say(f"warning: {adapter}: the objective in its run.json is not used: {error}")
    if not known:
        return config
    if len({_rewards(one.objective) for one in known.values()}) > 1:
        named = "; ".join(f"{adapter}: {_said(one)}" for adapter, one in known.items())
        say(
            f"the adapters were trained by other rewards than each other ({named}), and all are "
            f"judged by {_said(config)}; {way} names another"
        )
        return config
    first, found = next(iter(known.items()))
    if (found.preset, found.objective) == (config.preset, config.objective):
        return config
    alike = all(one.objective == found.objective for one in known.values())
    of_loss = "" if alike else " (loss and u are of this one's objective)"
    say(f"judged as {first} was trained, by {_said(found)}{of_loss}; {way} names another")
    return found


def _with_objective(config: RunConfig, settings: Mapping[str, Any], measure_kl: bool) -> RunConfig:
    """Raises: ConfigError where its objective, with what the user gave of one, is none."""
    fields = {field.name for field in dataclasses.fields(Objective)}
    own = {name: getattr(config.objective, name) for name in config.asked & fields}
    theirs = {name: settings[name] for name in fields - {"feature_weights"} if name in settings}
    if not config.asked.isdisjoint(HOLDS):
        theirs = {name: value for name, value in theirs.items() if name not in HOLDS}
    read = load_config({"objective": settings["objective"]} | theirs | own)
    held = read.objective.constraint
    if "constraint" not in own and (held == "activations" or (held == "kl" and not measure_kl)):
        without = {"constraint": "none", "target_drift": None, "target_kl": None}
        read = dataclasses.replace(read, objective=dataclasses.replace(read.objective, **without))
    weights = {"feature_weights": config.objective.feature_weights}  # a file of this command's
    objective = dataclasses.replace(read.objective, **weights)
    return dataclasses.replace(config, preset=read.preset, objective=objective)


def _rewards(objective: Objective) -> tuple[float, bool]:
    """All that rewards, their margins and accuracies depend on."""
    return objective.beta, objective.length_normalize


def _said(config: RunConfig) -> str:
    beta, per_token = _rewards(config.objective)
    what = "log-probs per token" if per_token else "log-probs summed over a response"
    return f"{config.preset} ({what}, beta {beta:g})"
