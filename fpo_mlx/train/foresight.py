"""What a run's settings alone foretell, said before its first update."""

from __future__ import annotations

from fpo_mlx.train.order import Order

MANY_PASSES = 5.0  # over the training pairs


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
