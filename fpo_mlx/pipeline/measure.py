"""By which objective adapters are judged: their training's, where the user named none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_mlx.config import Objective, RunConfig, load_config
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.origins import settings_of

TARGETS = ("target_drift", "target_kl")
HOLDS = ("constraint", *TARGETS)  # what is held, which is no part of rewards
# of the loss alone, and files or columns of the training that these pairs need not have
NEEDS = ("feature_weights", "score_margin")


def as_trained(
    config: RunConfig,
    adapters: Sequence[str],
    say: Say,
    *,
    measure_kl: bool = True,
    way: str = "--objective",
) -> RunConfig:
    """The settings with the objective by which the adapters' run.json says they were trained.

    An objective that the user named stands, and so do single settings of one; of one in a file it
    is said where an adapter was trained by other rewards. Where adapters were trained by other
    rewards than each other, all are judged by the settings as they are; one that
    says no objective counts as trained by these. What would need more than was given here (a place
    for activations, the pass for the KL, columns of scores) is left out: it is in the loss, and in
    no reward. What is used is said, with the user's `way` to another.
    """
    if "objective" in config.asked:
        if "objective" not in config.flagged:  # a file of one training, and adapters of others
            _tell_of_others(config, adapters, say, measure_kl, way)
        return config
    known = {path: _own(config, path, say, measure_kl) for path in dict.fromkeys(adapters)}
    saying = {path: one for path, one in known.items() if one is not None}
    if not saying:
        return config
    judged = {path: one or config for path, one in known.items()}
    if len({_rewards(one.objective) for one in judged.values()}) > 1:
        named = "; ".join(
            f"{path}: {_said(one) if one else 'says none'}" for path, one in known.items()
        )
        say(
            f"the adapters were trained by other rewards than each other ({named}), and all are "
            f"judged by {_said(config)}; {way} names another"
        )
        return config
    first, found = next(iter(saying.items()))
    if (found.preset, found.objective) == (config.preset, config.objective):
        return config
    alike = all(one.objective == found.objective for one in judged.values())
    of_loss = "" if alike else " (loss and u are of this one's objective)"
    say(f"judged as {first} was trained, by {_said(found)}{of_loss}; {way} names another")
    return found


def _tell_of_others(
    config: RunConfig, adapters: Sequence[str], say: Say, measure_kl: bool, way: str
) -> None:
    """Where the file's objective is not by the rewards of an adapter's training."""
    plain = dataclasses.replace(config, asked=frozenset())  # what their trainings said, alone
    others = [
        f"{path} by {_said(one)}"
        for path in dict.fromkeys(adapters)
        if (one := _own(plain, path, lambda _: None, measure_kl)) is not None
        and _rewards(one.objective) != _rewards(config.objective)
    ]
    if others:
        say(
            f"judged by {_said(config)}, which the file of -c names; trained by other rewards: "
            f"{'; '.join(others)}; {way} names another"
        )


def _own(config: RunConfig, adapter: str, say: Say, measure_kl: bool) -> RunConfig | None:
    """With the objective that its run.json says; None where that says none that can be used."""
    if "objective" not in (settings := settings_of(adapter)):
        return None
    try:
        return _with_objective(config, settings, measure_kl)
    except ConfigError as error:
        say(f"warning: {adapter}: the objective in its run.json is not used: {error}")
        return None


def _with_objective(config: RunConfig, settings: Mapping[str, Any], measure_kl: bool) -> RunConfig:
    """Raises: ConfigError where its objective, with what the user gave of one, is none."""
    fields = {field.name for field in dataclasses.fields(Objective)}
    own = {name: getattr(config.objective, name) for name in config.asked & fields}
    left: set[str] = set(NEEDS)
    if not config.asked.isdisjoint(HOLDS):
        left.update(HOLDS)
    if "alpha" in config.asked:  # which a target would find
        left.update(TARGETS)
    theirs = {name: settings[name] for name in fields - left if name in settings}
    read = load_config({"objective": settings["objective"]} | theirs | own)
    objective = read.objective
    held = objective.constraint
    if "constraint" not in own and (held == "activations" or (held == "kl" and not measure_kl)):
        objective = objective.held_by("none")
    # a file of this command's, not of the training's
    weights = config.objective.feature_weights
    objective = dataclasses.replace(objective, feature_weights=weights)
    return dataclasses.replace(config, preset=read.preset, objective=objective)


def _rewards(objective: Objective) -> tuple[float, bool]:
    """All that rewards, their margins and accuracies depend on."""
    return objective.beta, objective.length_normalize


def _said(config: RunConfig) -> str:
    beta, per_token = _rewards(config.objective)
    what = "log-probs per token" if per_token else "log-probs summed over a response"
    return f"{config.preset} ({what}, beta {beta:g})"
