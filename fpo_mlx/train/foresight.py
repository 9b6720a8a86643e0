"""What a run's settings alone foretell, said before its first update."""

from __future__ import annotations

from fpo_mlx.config import TrainConfig
from fpo_mlx.train.order import Order

MANY_PASSES = 5.0  # over the training pairs
IDLE = 0.1  # part of a run's updates behind the end of its schedule that is too much
# where the arguments of a schedule that ends hold its length and its last value, behind its first
ENDING = {"cosine_decay": (1, 2), "linear_schedule": (2, 1)}


def warnings(order: Order) -> list[str]:
    """Of a whole run."""
    return [said for said in (many_passes(order), short_schedule(order)) if said]


def many_passes(order: Order) -> str | None:
    """A warning where every pair is seen so often that it is learnt by heart.

    None where validations end the run before that.
    """
    if order.passes <= MANY_PASSES or order.config.early_stopping:
        return None
    return (
        f"{order.passes:.3g} passes over {len(order.pairs)} pairs: after a few a run mostly learns "
        "these very pairs by heart, and held-out pairs get no better. Take --epochs 2, or "
        "--early-stopping 3 with pairs that are held out"
    )


def short_schedule(order: Order) -> str | None:
    """A warning where the learning rate is at its end long before the run is."""
    if (found := _end_of(order.config)) is None:
        return None
    updates, (length, warmup, last) = order.count, found
    left = updates - warmup - length
    if left <= IDLE * updates:
        return None
    rest = f"the other {left:g} train at its last rate, {last:g}"
    return (
        f"lr_schedule ends at update {updates - left:g} of {updates}: {rest}"
        f"{', and so learn nothing' if last == 0 else ''}. For this run it is "
        f"{updates - warmup:g} long, not {length:g}"
    )


def _end_of(config: TrainConfig) -> tuple[float, float, float] | None:
    """(updates behind the warm-up, those of the warm-up, the last rate) of a schedule that ends.

    One that rises is a warm-up itself: its last rate is the one to train at.
    """
    block = config.lr_schedule or {}
    if block.get("name") not in ENDING:
        return None
    (at, end), arguments = ENDING[block["name"]], block["arguments"]
    last = arguments[end] if end < len(arguments) else 0.0
    if last >= arguments[0]:
        return None
    return arguments[at], block.get("warmup") or 0, last
