"""A model folder in few bits, as `mlx_lm.convert` leaves it."""

from __future__ import annotations

from mlx_lm import utils

# of a tiny model with latent attention, so that every matrix has rows in groups of 32
LATENT = {
    "intermediate_size": 64, "moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip


def quantised(source, target, bits=4, mode="affine"):
    """The folder as mlx_lm.convert would leave it."""
    model, config = utils.load_model(source)
    size = 16 if mode == "nvfp4" else 32
    model, config = utils.quantize_model(model, config, group_size=size, bits=bits, mode=mode)
    target.mkdir()
    utils.save_model(target, model)
    utils.save_config(config, target / "config.json")
    for path in source.glob("*token*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target
