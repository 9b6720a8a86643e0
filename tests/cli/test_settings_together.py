"""Flags and a YAML file that do not simply add up: which one stands, and what is said of it."""

from __future__ import annotations

import json

import pytest

from fpo_mlx.config import SaeTrainConfig, load_config, load_section, read_yaml
from fpo_mlx.errors import ConfigError

SCHEDULE = {"name": "cosine_decay", "arguments": [2e-5, 500]}


@pytest.fixture
def settings(tmp_path):
    """(flags, YAML) -> (settings, what was said)."""

    def load(flags, yaml, section=None):
        path, said = tmp_path / "run.yaml", []
        path.write_text(yaml if isinstance(yaml, str) else json.dumps(yaml))
        if section is not None:
            return load_section(section, flags, path, said.append), "\n".join(said)
        return load_config(flags, path, said.append), "\n".join(said)

    return load


def test_a_rate_on_the_command_line_takes_the_place_of_a_schedule_and_it_is_said(settings):
    """It did nothing, without a word."""
    found, said = settings({"learning_rate": 1e-6}, {"lr_schedule": SCHEDULE})
    assert (found.train.learning_rate, found.train.lr_schedule) == (1e-6, None)
    assert said.startswith("--learning-rate 1e-06 stands in the place of lr_schedule of ")
    found, said = settings({}, {"lr_schedule": SCHEDULE, "learning_rate": 2e-5})
    assert (found.train.lr_schedule, said) == (SCHEDULE, "")


@pytest.mark.parametrize(
    ("flag", "yaml"), [({"iters": 500}, {"epochs": 1}), ({"epochs": 2.0}, {"iters": 100})]
)
def test_a_flag_leaves_out_what_it_excludes_of_the_file(settings, flag, yaml):
    ((name, value),) = flag.items()
    found, said = settings(flag, yaml)
    assert getattr(found.train, name) == value
    assert getattr(found.train, *yaml) is None
    assert said.startswith(f"--{name} ")
    with pytest.raises(ConfigError, match="exclude each other"):
        settings({}, flag | yaml)
    with pytest.raises(ConfigError, match="exclude each other"):
        settings(flag | yaml, {})


def test_a_budget_of_an_sae_leaves_out_the_other_one_of_the_file(settings):
    found, said = settings({"training_tokens": 64}, {"minutes": 30}, SaeTrainConfig)
    assert (found.training_tokens, found.minutes) == (64, None)
    assert "--training-tokens 64 stands in the place of minutes of" in said
    found, _ = settings({"minutes": 2.0}, {"training_tokens": 64}, SaeTrainConfig)
    assert (found.training_tokens, found.minutes) == (None, 2.0)


def test_a_target_leaves_out_that_of_another_constraint(settings):
    found, _ = settings({"objective": "tdpo2", "target_kl": 3.0}, {"target_drift": 0.1})
    assert (found.objective.target_kl, found.objective.target_drift) == (3.0, None)


def test_parts_of_the_file_that_stand_in_a_chosen_objective_are_said(settings):
    yaml = {"objective": "fpo", "beta": 0.1, "alpha": 0.7, "gamma": 0.25, "top_k": 9}
    found, said = settings({"objective": "simpo"}, yaml)
    assert found.objective.beta == 0.1  # as documented
    assert said.count("\n") == 0
    assert said.startswith("--objective simpo: ")
    assert "beta 0.1 (simpo: 2.0)" in said
    assert "gamma 0.25 (simpo: 1.0)" in said
    assert "alpha" not in said  # nothing without a constraint
    assert "top_k" not in said  # no part of a preset
    _, said = settings({"objective": "simpo", "beta": 2.0, "gamma": 1.0}, yaml)
    assert said == ""
    _, said = settings({"objective": "tdpo1"}, yaml)
    assert "alpha 0.7 (tdpo1: 1.0)" in said


@pytest.mark.parametrize("flags", [{}, {"objective": "simpo"}])
def test_of_the_files_own_objective_nothing_is_said(settings, flags):
    assert settings(flags, {"objective": "simpo", "beta": 0.5})[1] == ""


def test_a_name_that_begins_like_a_number_is_a_text(settings):
    found, _ = settings({}, "adapter_path: 1e-5-fpo\nlearning_rate: 1e-5\n")
    assert (found.train.adapter_path, found.train.learning_rate) == ("1e-5-fpo", 1e-5)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("beta: 0.1\nalpha: 0.5\nbeta: 2.0\n", "beta", ("line 1", "line 3")),
        ("lora_parameters:\n  rank: 4\n  rank: 8\n", "rank", ("line 2", "line 3")),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(settings, tmp_path, text, key, lines):
    with pytest.raises(ConfigError, match=f"{key} stands there twice") as error:
        settings({}, text)
    for part in (tmp_path / "run.yaml", *lines):
        assert str(part) in str(error.value)


def test_a_key_may_stand_in_two_mappings_and_over_a_merged_one(settings, tmp_path):
    text = (
        "lora_parameters: &a {rank: 4, scale: 10.0}\n"
        "optimizer_config: {adam: {eps: 1e-8}, adamw: {eps: 1e-8}}\n"
    )
    assert settings({}, text)[0].train.lora["rank"] == 4
    nested = "x: &x {k: 1}\nb: {inner: &y {<<: *x, k: 2}}\nc: {<<: *y}\n"
    (tmp_path / "nested.yaml").write_text(nested)
    assert read_yaml(tmp_path / "nested.yaml")["b"] == {"inner": {"k": 2}}
    merged = "optimizer_config:\n  adam: &a {eps: 1e-8}\n  adamw: {<<: *a, eps: 1e-7}\n"
    assert settings({}, merged)[0].train.optimizer_config["adamw"] == {"eps": 1e-7}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lora_parameters: 8", "lora_parameters"),
        ("lr_schedule: cosine", "lr_schedule"),
        ("chat_template_args: [1]", "--chat-template-args"),
    ],
)
def test_what_is_no_mapping_is_named_as_it_is_written(settings, text, name):
    with pytest.raises(ConfigError) as error:
        settings({}, text + "\n")
    assert str(error.value).startswith(f"{name} ")
    assert str(error.value).endswith("wanted a mapping, {name: value}.")


@pytest.mark.parametrize("name", ["minutes", "passes", "memory_gb"])
@pytest.mark.parametrize("value", ["inf", "1e300"])
def test_a_budget_without_end_is_refused_by_name(settings, name, value):
    """It was an OverflowError, after the text had been read."""
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} .*: wanted more than 0, less than 1e"):
        settings({name: float(value)}, {}, SaeTrainConfig)
