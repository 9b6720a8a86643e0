"""Whether a model has a gradient at all, asked before hours of a reference pass."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fpo_mlx.errors import ModelError
from fpo_mlx.model import adapters
from fpo_mlx.model.heads import find_backbone
from fpo_mlx.model.policy import fresh_caches, needed_caches


def refuse_untrainable(model: nn.Module) -> None:
    """Take the adapters' gradient through a few tokens by shapes alone: no weight is read.

    Raises: ModelError where mlx-lm's code cannot run so, or an operation of it has no gradient.
    """
    backbone, own = find_backbone(model), dict(adapters.parameters(model))

    def total(weights: dict[str, mx.array]) -> mx.array:
        adapters.update(model, weights)
        tokens = mx.zeros((1, 4), mx.int32)
        return backbone(tokens, cache=fresh_caches(needed_caches(model))).sum()

    training = model.training
    model.train()  # some models take other kernels then
    try:
        mx.grad(total)(own)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__module__} cannot be trained, its gradient ends in: "
            f"{str(error).rstrip('.')}. Use a model of another architecture."
        ) from error
    finally:
        adapters.update(model, own)
        model.train(training)
