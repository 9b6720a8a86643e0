"""README and docs/ are held to the code: commands, flags, settings, presets, formats, links."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from command_line import run

from fpo_mlx import cache
from fpo_mlx.cache.identity import VERSION
from fpo_mlx.cli import main
from fpo_mlx.config import PRESETS, Objective, load_config, load_section
from fpo_mlx.data import parse_row
from fpo_mlx.judge.feature_report import Change, Found
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig, RoundsConfig
from fpo_mlx.pipeline.feature_page import FeaturePage
from fpo_mlx.pipeline.pairs_build import BuildReport
from fpo_mlx.pipeline.rounds import Round
from fpo_mlx.train.events import LandedReport, SkippedReport, StepReport, ValidReport

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
FOLDERS = sorted(path.name for path in (ROOT / "scripts").iterdir() if any(path.glob("*.py")))
PAGES = (
    *GUIDE,
    *(f"scripts/{folder}/README.md" for folder in FOLDERS),
    "SECURITY.md",
    "CHANGELOG.md",
)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
DOCS = "\n".join(TEXTS[page] for page in GUIDE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MISSING = TEXTS["README.md"].split("## Not there yet\n")[1].split("\n## ")[0]


def blocks(language: str, text: str = DOCS) -> list[str]:
    return [block for kind, block in FENCE.findall(text) if kind == language]


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


def path_of(words: list[str]) -> list[str]:
    """The words that name the command: ["sae", "info"] of sae info FOLDER."""
    return [word for i, word in enumerate(words) if tuple(words[: i + 1]) in PREFIXES]


def flags_of(command: click.Command) -> set[str]:
    options = [p for p in command.params if isinstance(p, click.Option)]
    return {name for o in options for name in (*o.opts, *o.secondary_opts)} | HELP


def shell_lines(text: str = DOCS) -> list[list[str]]:
    lines = [b.replace("\\\n", " ") for b in blocks("sh", text)]
    return [
        words for line in "".join(lines).splitlines() if (words := shlex.split(line, comments=True))
    ]


HELP = {"-h", "--help", "--help-all"}
COMMANDS = sorted(leaves())
PREFIXES = {path[: i + 1] for path in COMMANDS for i in range(len(path))}
FLAGS = {flag for path in COMMANDS for flag in flags_of(command_of(list(path)))}


def ours(words: list[str]) -> list[str]:
    """What comes after fpo-mlx, alone or behind a launcher such as mlx.launch or torchrun."""
    at = [i for i, word in enumerate(words) if word in ("fpo-mlx", "fpo_mlx")]
    return words[at[0] + 1 :] if at else []


OURS = [said for page in PAGES for words in shell_lines(TEXTS[page]) if (said := ours(words))]


def test_the_readme_has_at_most_200_lines():
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_is_in_the_docs(path):
    assert re.search(rf"fpo-mlx {' '.join(path)}\b", DOCS)
    assert f"`fpo-mlx {' '.join(path)}`" not in MISSING


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example_that_parses_its_own_flags(path):
    command = command_of(list(path))
    text = run(*path, "--help").stdout
    assert "Example:" in text
    example = text.split("Example:")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(example.strip().splitlines()[0])
    assert words[: len(path) + 1] == ["fpo-mlx", *path]
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= flags_of(command)


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_the_commands_and_flags_of_the_docs_exist(words):
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= flags_of(command_of(words))


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_click_takes_every_example_of_the_docs(words):
    path = path_of(words)
    command_of(path).make_context(" ".join(path), words[len(path) :])


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_a_block_of_the_shell_can_be_pasted_into_zsh(page):
    """zsh takes what follows a # at its prompt for words: `make demo # …` asks for a target `#`."""
    said = [line for block in blocks("sh", TEXTS[page]) for line in block.splitlines()]
    assert [line for line in said if re.search(r"(^|\s)#", line)] == []


def test_the_docs_show_the_commands_of_the_whole_way():
    shown = {words[0] for words in OURS}
    assert shown >= {"precompute", "train", "evaluate", "fuse", "sae"}


@pytest.mark.parametrize("page", GUIDE)
def test_every_flag_that_the_prose_names_belongs_to_some_command(page):
    assert set(re.findall(r"`(--[a-z][a-z-]*)", TEXTS[page].replace(MISSING, ""))) <= FLAGS


def test_the_prose_names_flags():
    assert len(set(re.findall(r"`(--[a-z][a-z-]*)", DOCS))) > 20


def test_what_is_said_to_be_missing_is_missing():
    for line in re.findall(r"`fpo-mlx ([a-z ]+)`", MISSING):
        assert tuple(line.split()) not in COMMANDS, f"fpo-mlx {line} is there now: say so"
        with pytest.raises(KeyError):
            command_of(line.split())
    assert not FLAGS & set(re.findall(r"`(--[a-z-]+)", MISSING))


def test_the_make_targets_of_the_docs_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(" ".join(re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE)).split())
    text = "\n".join(TEXTS.values())
    named = set(re.findall(r"`make ([a-z-]+)", text))
    named |= {words[1] for words in shell_lines(text) if words[0] == "make"}
    assert named >= {"demo", "test", "check", "docs"}
    assert named <= targets


@pytest.mark.parametrize("line", "".join(blocks("json")).splitlines())
def test_the_rows_of_the_docs_are_read_as_one_pair_each(line):
    row = parse_row(json.loads(line))
    assert [turn["role"] for turn in row.prompt if turn["role"] != "system"] == ["user"]
    assert [turn["role"] for turn in (*row.chosen, *row.rejected)] == ["assistant"] * 2


def test_the_docs_have_rows_and_a_configuration():
    assert len("".join(blocks("json")).splitlines()) >= 5
    assert len(blocks("yaml")) >= 1


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_the_yaml_of_the_docs_is_a_valid_configuration(number, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[number], encoding="utf-8")
    config = load_config({}, path)
    assert config.reference.model
    assert config.train.learning_rate == 2e-5
    assert config.train.optimizer_config == {"adamw": {"weight_decay": 0.01}}


def test_the_rounds_of_the_docs_train_as_the_study_that_measured_them(tmp_path):
    """Their file named a fifth of its rate and a fourth of its updates."""
    (text,) = (block for block in blocks("", TEXTS["docs/pairs.md"]) if "keep_old" in block)
    path = tmp_path / "rounds.yaml"
    path.write_text(text, encoding="utf-8")
    found = load_section(RoundsConfig, {}, path)
    assert load_section(JudgeConfig, found.judge).reward
    assert load_section(BuildConfig, found.build).margin
    study = ast.parse((ROOT / "scripts/studies/pairs_end_to_end.py").read_text(encoding="utf-8"))
    (measured,) = (
        ast.literal_eval(node.value) for node in study.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TRAIN"
    )  # fmt: skip
    fields = load_config({"model": "m", "data": "d", **found.train})
    train = {**vars(fields.train), **vars(fields.objective)}
    assert {name: train[name] for name in measured} == measured


def test_the_schedule_and_the_optimizer_of_the_docs_are_taken_by_mlx(tmp_path):
    pytest.importorskip("mlx.core")
    from fpo_mlx.train.optimizer import make_optimizer

    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[0], encoding="utf-8")
    optimizer = make_optimizer(load_config({}, path).train)
    assert type(optimizer).__name__ == "AdamW"
    assert float(optimizer.learning_rate.item()) == 0.0  # warm-up begins there


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_says_what_the_presets_are(name):
    page = TEXTS["docs/objective.md"]
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
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
    page = TEXTS["docs/files.md"]
    said = " ".join(page.split())
    doc = cache.__doc__ or ""
    arrays = [line.split() for line in doc.splitlines() if re.match(r"    \S", line)]
    assert len(arrays) >= 10
    for words in arrays:
        assert " ".join(words) in said
    assert f"format version {VERSION}" in page


RECORDS = {
    "| `train` |": StepReport,
    "| `valid` |": ValidReport,
    "| `skipped` |": SkippedReport,
    "| `landed` |": LandedReport,
    "| `pairs/pairs.json` |": BuildReport,
    "| `round-N/round.json` |": Round,
    "| `features --json` |": Change,
    "| `features show --json` |": FeaturePage,
    "| `features find --json` |": Found,
}


@pytest.mark.parametrize("start", RECORDS)
def test_the_page_on_files_names_every_field_of_what_is_written(start):
    (row,) = (line for line in TEXTS["docs/files.md"].splitlines() if line.startswith(start))
    fields = {field.name for field in dataclasses.fields(RECORDS[start])} - {"iteration"}
    assert fields - set(re.findall(r"`(\w+)`", row)) == set()


def test_the_page_on_architecture_names_every_room_of_the_package_in_its_table_of_layers():
    table = TEXTS["docs/architecture.md"].split("| layer |")[1].split("\n\n")[0]
    rooms = {path.stem for path in (ROOT / "fpo_mlx").iterdir() if path.name[0] not in "_."}
    assert {room for room in rooms - {"py"} if f"`{room}`" not in table} == set()


# Links --------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Without code blocks and comments, where nothing is a link or a heading."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """What GitHub and mkdocs make of the headings; both must be the same for a link to hold."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def problem(page: str, link: str) -> str | None:
    """What is wrong with a link on a page; None if it leads somewhere."""
    if "://" in link:
        good = re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./#?=&%~+-]*)?", link)
        return None if good else "is no plain https address"
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    if not target.is_file():
        return "leads to no file"
    if ROOT not in target.resolve().parents:
        return "leads out of the repository"
    if anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
        return "leads to no heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading(page):
    faults = [f"{link} {said}" for link in links(TEXTS[page]) if (said := problem(page, link))]
    assert not faults


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("docs/nowhere.md", "no file"),
        ("docs", "no file"),
        ("docs/sae.md#no-such-heading", "no heading"),
        ("#no-such-heading", "no heading"),
        ("../elsewhere.md", "no file"),
        ("http://example.org/", "https"),
        ("https://example", "https"),
    ],
)
def test_a_broken_link_is_found(link, said):
    assert said in (problem("README.md", link) or "")


@pytest.mark.parametrize("page", [page for page in GUIDE if page != "README.md"])
def test_the_readme_leads_to_every_page_of_the_docs(page):
    assert page in {link.partition("#")[0] for link in links(TEXTS["README.md"])} | {
        "docs/changelog.md"  # the README links CHANGELOG.md, which that page includes
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = TEXTS[page].replace(MISSING, "")
    for path in re.findall(r"`((?:fpo_mlx|tests|scripts|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_script_of_a_shell_example_exists_and_has_its_flags(page):
    for words in shell_lines(TEXTS[page]):
        for script in [word for word in words if word.startswith("scripts/")]:
            source = (ROOT / script).read_text(encoding="utf-8")
            used = [word.split("=")[0] for word in words if word.startswith("--")]
            assert [flag for flag in used if f'"{flag}"' not in source] == [], script


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_readme_of_a_folder_of_scripts_names_each_and_only_flags_that_they_have(folder):
    text = TEXTS[f"scripts/{folder}/README.md"]
    sources = {
        p.name: p.read_text(encoding="utf-8") for p in (ROOT / "scripts" / folder).glob("*.py")
    }
    assert {name for name in sources if f"`{name}`" not in text} == set()
    for row in [line for line in text.splitlines() if line.startswith("| `")]:
        source = sources[row.split("`")[1]]
        flags = re.findall(r"--[a-z][a-z-]*", row)
        assert [f for f in flags if f'"{f}"' not in source and f not in FLAGS] == [], row


def test_the_changelog_speaks_of_this_version():
    from fpo_mlx import __version__

    assert f"## {__version__.split('.dev')[0]}" in TEXTS["CHANGELOG.md"]


def test_nothing_is_said_to_have_run_on_metal():
    assert "Nothing was run on Metal" in TEXTS["README.md"]
    assert "Nothing was run on Metal" in TEXTS["docs/measurements.md"]
