"""Losses and gradients of pairs, as the trainer takes them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.model import adapters


def losses_and_grads(scorer, values, pairs):
    """As the trainer does it: references scored with fresh adapters, then values put in."""
    refs = scorer.reader.scores(pairs)
    adapters.update(scorer.policy.model, {k: mx.array(v) for k, v in values.items()})

    def mean_loss():
        losses, measures = scorer.losses(pairs, refs, grad=True)
        return losses.losses.mean(), tuple(losses), measures

    (_, losses, measures), grads = nn.value_and_grad(scorer.policy.model, mean_loss)()
    flat = {k: np.array(v) for k, v in nn.utils.tree_flatten(grads)}
    return [np.array(v) for v in losses], measures, flat
