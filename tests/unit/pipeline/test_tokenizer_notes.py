"""What there is to say of a tokenizer is said by every command that opens one."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

from evaluated import own_cache, place  # noqa: E402, F401

from fpo_mlx.config import SaeTrainConfig, load_config  # noqa: E402
from fpo_mlx.pipeline import plan, sae_fit, sae_setup  # noqa: E402

SLIP = {"enable_thoughts": False}  # no variable of the template


def passages(place, say):
    config = load_config({"chat_template_args": SLIP, "data": str(place / "data")})
    sae_fit.read_passages(config, place / "model", 2, say)


def planned(place, say):
    given = {"model": str(place / "model"), "objective": "dpo"}
    plan(load_config(given | {"chat_template_args": SLIP}), say=say)


def documents(place, say):
    config = SaeTrainConfig(data=str(place / "data"), train_split="valid", chat_template_args=SLIP)
    sae_setup._documents(config, place / "model", say)


@pytest.mark.parametrize("command", [passages, planned, documents])
def test_a_slip_in_the_templates_variables_is_said_once(place, command):
    said = []
    command(place, said.append)
    assert sum("no variable 'enable_thoughts'" in line for line in said) == 1, said
