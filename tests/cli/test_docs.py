"""The README is held to the code: commands, flags, settings, presets, formats, links."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fpo_mlx import cache
from fpo_mlx.cache.identity import VERSION
from fpo_mlx.cli import main
from fpo_mlx.config import PRESETS, Objective, load_config
from fpo_mlx.data import parse_row

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "SECURITY.md", "CHANGELOG.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MISSING = README.split("## Not there yet\n")[1].split("\n## ")[0]


def blocks(language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(README) if kind == language]


def leaves(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """("train",), ("sae", "info"), …: every command that does something."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*path, name)


def command_of(words: list[str]) -> click.Command:
    """The command that these words begin with; raises KeyError for an unknown one."""
    command: click.Command = main
    for word in words:
        if not isinstance(command, click.Group):
            break
        if word.startswith("-") and command.invoke_without_command:
            break
        command = command.commands[word]
    return command


def flags_of(command: click.Command) -> set[str]:
    options = [p for p in command.params if isinstance(p, click.Option)]
    return {name for o in options for name in (*o.opts, *o.secondary_opts)} | {"-h", "--help"}


def shell_lines() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = sorted(leaves())
OURS = [words[1:] for words in shell_lines() if words[0] == "fpo-mlx"]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_is_in_the_readme(path):
    assert re.search(rf"fpo-mlx {' '.join(path)}\b", README)
    assert f"`fpo-mlx {' '.join(path)}`" not in MISSING


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example_that_parses_its_own_flags(path):
    command = command_of(list(path))
    text = command.get_help(click.Context(command))
    assert "Example:" in text
    example = text.split("Example:")[1].split("Options:")[0].replace("\\\n", " ")
    words = shlex.split(example.strip().splitlines()[0])
    assert words[: len(path) + 1] == ["fpo-mlx", *path]
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= flags_of(command)


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_the_readmes_commands_and_flags_exist(words):
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= flags_of(command_of(words))


def test_the_readme_shows_the_commands_of_the_whole_way():
    shown = {words[0] for words in OURS}
    assert shown >= {"precompute", "train", "evaluate", "fuse", "sae"}


def test_every_flag_that_the_prose_names_belongs_to_some_command():
    known = {flag for path in COMMANDS for flag in flags_of(command_of(list(path)))}
    named = set(re.findall(r"`(--[a-z][a-z-]*)", README.replace(MISSING, "")))
    assert len(named) > 20
    assert named <= known


def test_what_is_said_to_be_missing_is_missing():
    for line in re.findall(r"`fpo-mlx ([a-z ]+)`", MISSING):
        assert tuple(line.split()) not in COMMANDS, f"fpo-mlx {line} is there now: say so"
        with pytest.raises(KeyError):
            command_of(line.split())
    known = {flag for path in COMMANDS for flag in flags_of(command_of(list(path)))}
    assert not known & set(re.findall(r"`(--[a-z-]+)", MISSING))


def test_the_readmes_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)$|`make ([a-z]+)", README, re.MULTILINE))
    named |= {(words[1], "") for words in shell_lines() if words[0] == "make"}
    assert {a or b for a, b in named} >= {"demo", "test", "check"}
    assert {a or b for a, b in named} <= targets


@pytest.mark.parametrize("line", "".join(blocks("json")).splitlines())
def test_the_readmes_rows_are_read_as_one_pair_each(line):
    row = parse_row(json.loads(line))
    assert [turn["role"] for turn in row.prompt if turn["role"] != "system"] == ["user"]
    assert [turn["role"] for turn in (*row.chosen, *row.rejected)] == ["assistant"] * 2


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_the_readmes_yaml_is_a_valid_configuration(number, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[number], encoding="utf-8")
    config = load_config({}, path)
    assert config.reference.model
    assert config.train.learning_rate == 2e-5
    assert config.train.optimizer_config == {"adamw": {"weight_decay": 0.01}}


def test_the_readmes_schedule_and_optimizer_are_taken_by_mlx(tmp_path):
    pytest.importorskip("mlx.core")
    from fpo_mlx.train.optimizer import make_optimizer

    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[0], encoding="utf-8")
    optimizer = make_optimizer(load_config({}, path).train)
    assert type(optimizer).__name__ == "AdamW"
    assert float(optimizer.learning_rate.item()) == 0.0  # warm-up begins there


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_says_what_the_presets_are(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    said = [cell.strip() for cell in row.strip("|").split("|")][1:]
    o = Objective(**PRESETS[name])
    free = o.constraint != "none"
    assert said == [
        "mean" if o.length_normalize else "sum",
        o.margin,
        o.constraint,
        ("yes" if o.stop_gradient else "no") if free else "–",
        f"{o.alpha}" if free else "–",
        f"{o.beta}",
        f"{o.gamma}" if o.margin == "constant" else "–",
    ]


def test_the_cache_format_is_quoted_from_the_package():
    said = " ".join(README.split())
    doc = cache.__doc__ or ""
    arrays = [line.split() for line in doc.splitlines() if re.match(r"    \S", line)]
    assert len(arrays) >= 10
    for words in arrays:
        assert " ".join(words) in said
    assert f"format version {VERSION}" in README


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        assert not path or (ROOT / page).parent.joinpath(path).is_file(), link
        if anchor and not path:
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}
    assert links or page != "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace(MISSING, "")
    for path in re.findall(r"`((?:fpo_mlx|tests|scripts)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_changelog_speaks_of_this_version():
    from fpo_mlx import __version__

    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
