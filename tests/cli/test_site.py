"""The site's reference and its links, as `make docs` makes them."""

from __future__ import annotations

import dataclasses

import click
import hooks
import pytest
import reference
from test_docs import COMMANDS, DOCS, command_of

from fpo_mlx.config import GROUPS, SECTIONS, SaeTrainConfig, Sampling

SETTINGS = {f.name: f for section in (*SECTIONS, Sampling) for f in dataclasses.fields(section)}


def section(text: str, title: str, level: str) -> str:
    return text.split(f"\n{level} {title}\n", 1)[1].split(f"\n{level} ")[0]


@pytest.fixture(scope="module")
def commands() -> str:
    return "\n" + reference.commands()


@pytest.fixture(scope="module")
def settings() -> str:
    return "\n" + reference.settings()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_reference_has_every_command_with_every_option_and_its_help(path, commands):
    part = section(commands, " ".join(path), "##")
    assert f"fpo-mlx {' '.join(path)} " in part
    for option in command_of(list(path)).params:
        if isinstance(option, click.Option):
            (row,) = [
                line for line in part.splitlines() if line.startswith(f"| `{option.opts[0]}`")
            ]
            assert all(f"`{name}`" in row for name in (*option.opts, *option.secondary_opts))
            assert reference.prose(option.help or "") in row


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_has_every_setting_once_in_its_group(name, settings):
    group = SETTINGS[name].metadata["group"]
    part = section(settings, group[0].upper() + group[1:], "###")
    assert sum(line.startswith(f"| `{name}`") for line in part.splitlines()) == 1


def test_the_groups_stand_in_the_order_of_the_config(settings):
    titles = [line[4:].lower() for line in settings.splitlines() if line.startswith("### ")]
    assert titles == [*(group.lower() for group in GROUPS), "sae training"]


def test_the_reference_has_every_setting_of_sae_training_once(settings):
    rows = section(settings, "SAE training", "###").splitlines()
    for field in dataclasses.fields(SaeTrainConfig):
        assert sum(row.startswith(f"| `{field.name}`") for row in rows) == 1


def test_a_row_of_the_settings_says_key_values_default_meaning_and_resume(settings):
    rows = settings.splitlines()
    assert "| `beta` | number, more than 0 | `0.1` | strength of the preference term | no |" in rows
    assert any(row.startswith("| `feature_scale` | `raw`, `reference` | `raw` |") for row in rows)
    assert any(row.startswith("| `lora_parameters` (only in YAML) | mapping |") for row in rows)
    assert any(row.startswith("| `iters` |") and row.endswith("| yes |") for row in rows)


def test_a_default_of_false_or_zero_is_shown_and_an_empty_one_is_not(settings):
    rows = settings.splitlines()
    assert any(row.startswith("| `grad_checkpoint` | true, false | `false` |") for row in rows)
    assert any(row.startswith("| `gamma` | number | `0.0` |") for row in rows)
    assert any(row.startswith("| `chat_template` | text |  |") for row in rows)


def test_every_placeholder_of_the_docs_is_filled():
    marks = [match[1] for match in hooks.MARK.finditer(DOCS)]
    assert sorted(marks) == ["changelog", "commands", "settings"]
    assert all(len(hooks.generated(match)) > 1000 for match in hooks.MARK.finditer(DOCS))


@pytest.mark.parametrize(
    ("file", "link", "wanted"),
    [
        ("docs/a.md", "b.md#c", "b.md#c"),
        ("docs/a.md", "../tests/x.py", "repository/tests/x.py"),
        ("docs/a.md", "../README.md#install", "index.md#install"),
        ("docs/a.md", "../CHANGELOG.md", "changelog.md"),
        ("README.md", "docs/sae.md#judge-an-sae", "sae.md#judge-an-sae"),
        ("README.md", "LICENSE", "repository/LICENSE"),
        ("scripts/bench/README.md", "../../docs/a.md", "../../../a.md"),
        ("scripts/bench/README.md", "out.svg", "out.svg"),
        ("docs/a.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("docs/a.md", "#here", "#here"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(file, link, wanted):
    assert hooks.rewritten(file, f"[x]({link})") == f"[x]({wanted})"
