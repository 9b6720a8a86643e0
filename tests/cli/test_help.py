"""The help: the way on one page, the settings that matter first, all of them when asked for."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import refused, run
from terminal import on_a_terminal

from fpo_mlx.cli import THE_WAY, main
from fpo_mlx.cli.help import SHORT, Command, grouped, shown_of
from fpo_mlx.cli.options import READING
from fpo_mlx.config import GROUPS, SECTIONS, SaeTrainConfig, named, options

ROOT = Path(__file__).resolve().parents[2]
FLAG = re.compile(r"--[a-z][a-z-]*")


def tree(group: click.Group = main, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from tree(command, (*path, name))


EVERY = dict(tree())


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def flags(command: click.Command) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}


def titles(text: str) -> list[str]:
    return re.findall(r"^([A-Z][\w ]+):$", text, re.MULTILINE)


def test_without_arguments_the_way_is_shown_stage_by_stage():
    result = run()
    assert result.exit_code == 0
    assert result.stdout == run("--help").stdout
    assert titles(result.stdout) == ["Example", *THE_WAY, "General"]
    for commands in THE_WAY.values():
        for command in commands:
            (line,) = re.findall(rf"^  {command.name}  .*$", result.stdout, re.MULTILINE)
            assert line.endswith("."), f"the first sentence of {command.name} is too long: {line}"


def test_every_command_has_its_place_on_the_way():
    placed = [command.name for commands in THE_WAY.values() for command in commands]
    assert sorted(placed) == sorted(main.commands)


def test_a_command_that_reads_an_sae_takes_all_that_says_how():
    wanted = {"--" + name.replace("_", "-") for name in READING}
    reads = {path: flags(command) for path, command in EVERY.items()}
    lacking = {p: wanted - f for p, f in reads.items() if "--sae-format" in f and not wanted <= f}
    assert lacking == {}


def test_the_help_of_fuse_names_every_architecture_of_a_gguf():
    gguf_file = pytest.importorskip("fpo_mlx.model.gguf_file")
    (option,) = (p for p in main.commands["fuse"].params if p.name == "export_gguf")
    assert isinstance(option, click.Option)
    assert str(option.help).endswith(f": {', '.join(gguf_file.ARCHITECTURES)}.")


def test_options_before_a_subcommand_are_refused_and_not_dropped(tmp_path):
    words = ["--split", "test", "-c", tmp_path / "run.yaml", "--sort", "change"]
    done = run("features", *words, "data", "--model", "m")
    seen = "--config, --split before `data` would not be seen: "
    parts = seen, "features data --config … --split …`", "--sort: `", " has no such option"
    refused(done, 2, *parts)


def test_a_stage_may_be_asked_for_without_a_machine_being_set_up(monkeypatch):
    called = []
    monkeypatch.setattr("fpo_mlx.cli.machine_set_up", lambda: called.append(1))
    assert run("--help").exit_code == run().exit_code == 0
    assert called == []


def test_the_help_of_train_shows_the_dozen_that_matter_and_says_how_many_more_there_are():
    text = run("train", "--help").stdout
    first = {"--" + name.replace("_", "-") for name, f in options().items() if f.metadata["first"]}
    assert 12 <= len(first) <= 15
    shown = set(FLAG.findall(text.split("Data:")[1]))
    assert shown - {f"--no-{flag[2:]}" for flag in first} == first | {
        "--objective", "--config", "--help", "--help-all",
    }  # fmt: skip
    given = len(main.commands["train"].params) + 2  # --help and --help-all
    assert f"{given - len(first) - 4} more settings: " in text
    assert "train --help-all" in text.splitlines()[-1]


@pytest.mark.parametrize("command", ["check", "precompute", "train", "evaluate", "compare"])
def test_variables_of_the_template_stand_in_the_short_help_for_they_change_what_is_scored(command):
    assert "--chat-template-args" in run(command, "--help").stdout


@pytest.mark.parametrize("words", [["train", "--nothing"], ["nothing"], ["cache", "info"]])
def test_the_message_of_a_wrong_flag_has_no_spaces_that_fill_the_line(words):
    said = run(*words).stderr.splitlines()
    assert said[0].startswith("Usage: ")
    assert said[1].startswith("Try ")
    assert said == [line.rstrip() for line in said]


def test_help_all_shows_every_setting_under_its_group():
    text = run("train", "--help-all").stdout
    assert titles(text) == [
        "Example", "Data", "Model and SAE", "Objective", "Adapters", "Schedule", "Memory", "Saving",
        "Safety", "General",
    ]  # fmt: skip
    found = dict(grouped(main.commands["train"].params))
    for section in SECTIONS:
        for name, field in section.__dataclass_fields__.items():
            if not field.metadata["yaml_only"]:
                group = field.metadata["group"]
                assert "--" + name.replace("_", "-") in found[group[0].upper() + group[1:]]
    assert "more settings" not in text


@pytest.mark.parametrize(
    ("words", "sections"), [(["train"], SECTIONS), (["sae", "train"], (SaeTrainConfig,))]
)
def test_help_all_names_what_a_resumed_run_may_have_otherwise(words, sections):
    said = run(*words, "--help-all").stdout.split("May change on --resume: ")
    assert len(said) == 2
    may = {"--" + name.replace("_", "-") for name in named("may_change", sections)}
    assert set(FLAG.findall(said[1])) == may - {"--resume", "--overwrite"}
    assert "May change" not in run("evaluate", "--help-all").stdout, "it resumes nothing"


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_help_names_every_flag_and_its_example_fits_80_columns(path):
    command = EVERY[path]
    assert isinstance(command, Command)
    result = run(*path, "--help-all" if "--config" in flags(command) else "--help")
    assert result.exit_code == 0
    names = re.findall(r"^  (\S+(?: \S+)*)", result.stdout, re.MULTILINE)  # the left column
    unfolded = "".join(names)  # a long pair of flags goes on in the next line
    assert {flag for flag in flags(command) if flag not in unfolded} == set()
    assert "Example:" in result.stdout
    for line in inspect.cleandoc(command.help or "").split("Example:")[1].splitlines():
        assert line in result.stdout.splitlines(), f"{line!r} does not fit"
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_command_with_few_options_shows_them_all_at_once():
    few, many = main.commands["convert"].params, main.commands["train"].params
    assert len(few) <= SHORT < len(many)
    assert shown_of(few, everything=False) == few
    assert len(shown_of(many, everything=False)) < len(many)
    assert shown_of(many, everything=True) == many


def test_groups_stand_in_one_order():
    found = [title for title, _ in grouped(main.commands["evaluate"].params)]
    capital = [group[0].upper() + group[1:] for group in GROUPS]
    assert found == ["Options", *(group for group in capital if group in found), "General"]


COMMAND = ("-m", "fpo_mlx")


def test_there_are_colours_on_a_terminal_and_none_in_a_pipe():
    coloured, code = on_a_terminal(*COMMAND, "plan", "--help")
    assert code == 0
    assert "\x1b[" in coloured
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured).replace("\r\n", "\n")
    piped = subprocess.run(
        [sys.executable, *COMMAND, "plan", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "\x1b" not in piped.stdout
    assert [line.rstrip() for line in plain.splitlines()] == piped.stdout.splitlines()


def test_an_error_is_one_plain_line_also_on_a_terminal():
    text, code = on_a_terminal(*COMMAND, "train", "--learning-rat", "1")
    assert code == 2
    assert re.search(r"^Error: No such option '--learning-rat'.*'--learning-rate'\?", text, re.M)
    assert "─" not in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_flags_and_choices_as_the_docs_say(shell):
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert f"_FPO_MLX_COMPLETE={shell}_source fpo-mlx" in page

    def told(mode: str, words: str = "", word: int = 0) -> str:
        asked = {"_FPO_MLX_COMPLETE": f"{shell}_{mode}", "COMP_WORDS": words}
        asked["COMP_CWORD"] = words.split()[-1] if shell == "fish" and words else str(word)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in asked.items():
                patch.setenv(name, value)
            return run_as_program()

    assert "COMP_WORDS" in told("source")
    assert "train" in told("complete", "fpo-mlx tra", 1)
    assert "--learning-rate" in told("complete", "fpo-mlx train --learn", 2), "hidden in --help"


def run_as_program() -> str:
    """Completion is asked for by an environment variable that has the program's name."""
    from click.testing import CliRunner

    result = CliRunner().invoke(main, [], prog_name="fpo-mlx")
    assert result.exit_code == 0, result.output
    return result.stdout
