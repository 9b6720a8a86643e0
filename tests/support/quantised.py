"""A model folder in few bits, as `mlx_lm.convert` leaves it."""

from __future__ import annotations

from mlx_lm import utils


def quantised(source, target, bits=4):
    """The folder as mlx_lm.convert would leave it."""
    model, config = utils.load_model(source)
    model, config = utils.quantize_model(model, config, group_size=32, bits=bits)
    target.mkdir()
    utils.save_model(target, model)
    utils.save_config(config, target / "config.json")
    for path in source.glob("*token*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target
