"""Every setting has one way in, and is read: flags, YAML, presets, defaults, help texts."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import subprocess
import sys
import typing
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fpo_mlx import pipeline
from fpo_mlx.cli import main, trackers
from fpo_mlx.config import PRESETS, SECTIONS, RunConfig, load_config, named, options
from fpo_mlx.config.fields import Bounds
from fpo_mlx.errors import ConfigError
from fpo_mlx.train.optimizer import make_optimizer

YAML_ONLY = named("yaml_only")
PACKAGE = Path(__file__).resolve().parents[2] / "fpo_mlx"
HINTS = {name: h for section in SECTIONS for name, h in typing.get_type_hints(section).items()}


def leaves(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group, the main one too."""
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name)


@pytest.fixture
def configured(monkeypatch):
    """`fpo-mlx train` with these words -> the RunConfig that reaches the pipeline."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(pipeline, "train", lambda config, **_: seen.append(config) or iter(()))
    monkeypatch.setattr(trackers, "tracking", lambda *_: nullcontext(lambda report: None))

    def run(*words: object) -> RunConfig:
        done = CliRunner().invoke(main, ["train", *map(str, words)])
        assert done.exit_code == 0, done.output
        return seen[-1]

    return run


def another_value(name: str) -> tuple[list[str], object]:
    """(words, value): a flag with a value that is not the setting's default."""
    hint, default, flag = HINTS[name], options()[name].default, "--" + name.replace("_", "-")
    inner = [a for a in typing.get_args(hint) if a is not type(None)]
    if hint is bool:
        return [f"--no-{flag[2:]}" if default else flag], not default
    if typing.get_origin(hint) is typing.Literal:
        value = next(a for a in inner if a != default)
        return [flag, value], value
    if typing.get_origin(hint) is tuple:
        return [flag, "a", flag, "b"], ("a", "b")
    kind = inner[0] if inner else hint
    value = {int: 7, float: 0.125, str: "something", dict: {"shout": True}}[kind]
    return [flag, json.dumps(value) if kind is dict else str(value)], value


@pytest.mark.parametrize("name", sorted(set(options()) - set(YAML_ONLY)))
def test_a_flag_of_train_changes_its_own_setting_and_no_other(configured, name):
    words, value = another_value(name)
    beside = ["--objective", "tdpo2"] if name == "target_kl" else []  # it needs a KL constraint
    before, after = configured(*beside).as_dict(), configured(*beside, *words).as_dict()
    assert after[name] == value
    assert before[name] != value
    assert {k: v for k, v in after.items() if k != name} == {
        k: v for k, v in before.items() if k != name
    }


@pytest.mark.parametrize("name", YAML_ONLY)
def test_a_setting_without_a_flag_comes_from_yaml(configured, tmp_path, name):
    special = {"lora_parameters": {"rank": 4}, "link_parameters": {"rho": 0.2}}
    value = special.get(name, {"name": "x"})
    (tmp_path / "c.yaml").write_text(f"{name}: {value}\n")
    beside = ["--link", "ada"] if name == "link_parameters" else []
    assert configured("-c", tmp_path / "c.yaml", *beside).as_dict()[name] == value
    flag = "--" + name.replace("_", "-")
    assert CliRunner().invoke(main, ["train", flag, "1"]).exit_code == 2


def test_command_line_beats_yaml_beats_preset_beats_default(configured, tmp_path):
    (tmp_path / "c.yaml").write_text("objective: simpo\ngamma: 0.25\nseed: 3\nbatch_size: 2\n")
    yaml, preset = ("-c", tmp_path / "c.yaml"), PRESETS["simpo"]
    assert (preset["beta"], preset["gamma"]) == (2.0, 1.0)
    config = configured(*yaml, "--seed", 5)
    assert config.preset == "simpo"
    assert (config.train.seed, config.train.batch_size) == (5, 2)  # flag, YAML
    assert (config.objective.gamma, config.objective.beta) == (0.25, 2.0)  # YAML, preset
    assert (config.objective.alpha, config.objective.top_k) == (0.5, 50)  # defaults
    assert configured(*yaml, "--gamma", 0.75).objective.gamma == 0.75
    assert configured(*yaml, "--objective", "dpo").objective.beta == load_config({}).objective.beta
    assert configured("--objective", "simpo").objective.beta == 2.0


@pytest.mark.parametrize(
    ("own", "other", "kept"),
    [
        ("owner/pairs", "mine.jsonl", False),
        ("pairs", "./pairs/", True),
        ("pairs", "owner/others", True),
        (None, "mine.jsonl", True),
        ("owner/pairs", None, True),
    ],
)
def test_names_of_splits_go_with_the_data_of_the_yaml_file(tmp_path, monkeypatch, own, other, kept):
    """`evaluate -c run.yaml --data mine.jsonl` was told to leave out what stands in run.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "mine.jsonl").write_text("")
    yaml = {"test_split": "test_prefs", "subset": "english", "valid_share": 0.05}
    (tmp_path / "run.yaml").write_text(json.dumps(yaml | ({"data": own} if own else {})))
    said: list[str] = []
    found = load_config({"data": other}, tmp_path / "run.yaml", said.append).data
    assert (found.test_split, found.subset) == (("test_prefs", "english") if kept else (None, None))
    assert found.valid_share == (0.05 if kept else 0)
    told = f"valid_share 0.05 of {tmp_path / 'run.yaml'} is of its own data, not of mine.jsonl"
    assert said == ([] if kept else [f"{told}: left out"])
    mine = {"data": other, "test_split": "mine", "valid_share": 0.1}
    given = load_config(mine, tmp_path / "run.yaml").data
    assert (given.test_split, given.valid_share) == ("mine", 0.1)


@pytest.mark.parametrize(("given", "own", "kept"), [
    ({"valid_split": "dev"}, "valid_share: 0.05", (0, "dev")),
    ({"valid_share": 0.1}, "valid_split: dev", (0.1, None)),
    ({"valid_share": 0}, "valid_split: dev", (0, "dev")),
])  # fmt: skip
def test_a_flag_for_validation_pairs_displaces_the_other_one_of_a_yaml_file(
    tmp_path, given, own, kept
):
    (tmp_path / "run.yaml").write_text(own)
    found = load_config(given, tmp_path / "run.yaml").data
    assert (found.valid_share, found.valid_split) == kept
    both = {"valid_split": "dev", "valid_share": 0.1}
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config(both, tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [("learning_rat: 1\n", "learning_rate"), ("[1, 2]\n", "list"), ("a: [\n", "YAML")],
)
def test_a_bad_yaml_file_is_a_usage_error_that_names_it(tmp_path, text, part):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    done = CliRunner().invoke(main, ["train", "-c", str(path)])
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert part in done.stderr


BAD_SETTINGS = {
    "max_grad_norm: -1": "--max-grad-norm -1",  # it would train backwards
    "epochs: 0": "--epochs 0: wanted more than 0",
    "iters: -3": "--iters -3: wanted 1 or more",
    "seed: -1": "--seed -1: wanted 0 or more",
    "val_batches: -2": "--val-batches -2",
    "lora_parameters: {rank: x}": "rank 'x'",
    "lora_parameters: {rank: 8.9}": "rank 8.9",
    "lora_parameters: {rank: null, scale: a}": "rank None.*scale 'a'",
    "lora_parameters: {dropout: 1}": "dropout 1",
    "lora_parameters: {keys: self_attn.q_proj}": "keys 'self_attn.q_proj', wanted a list",
    "lora_parameters: {keys: 5}": "keys 5",
    "lora_parameters: {rank: 4, 8: scale}": "unknown 8; wanted rank, scale",
}


NO_NUMBER = math.nan
BOUNDS = {  # in words; what is within, what is not
    "more than 0": (Bounds(above=0), [1e-9, math.inf], [0, -1, NO_NUMBER]),
    "0 or more": (Bounds(least=0), [0, math.inf], [-1e-9, NO_NUMBER]),
    "0 to 1": (Bounds(least=0, most=1), [0, 1], [-0.1, 1.1, NO_NUMBER]),
    "more than 0, 5 at most": (Bounds(above=0, most=5), [5], [0, 6, math.inf]),
    "0 or more, less than 0.5": (Bounds(least=0, below=0.5), [0, 0.49], [0.5]),
    "a finite number": (Bounds(below=math.inf), [-1e300, 0], [math.inf, -math.inf, NO_NUMBER]),
    "a finite number, more than 0": (Bounds(above=0, below=math.inf), [1], [0, math.inf]),
    "": (Bounds(), [NO_NUMBER, math.inf, True], []),
}


@pytest.mark.parametrize("words", BOUNDS)
def test_bounds_hold_what_their_words_say(words):
    bounds, within, outside = BOUNDS[words]
    assert str(bounds) == words
    assert all(map(bounds.hold, within))
    assert not any(map(bounds.hold, outside))


def test_a_number_just_beyond_its_bound_is_not_rounded_into_it():
    with pytest.raises(ConfigError, match=r"--epochs 1000000.5: wanted .* 1e\+06 at most"):
        load_config({"epochs": 1000000.5})


def test_all_that_is_wrong_with_a_section_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        load_config({"beta": 0.0, "top_k": 0, "label_smoothing": 0.5})
    assert str(error.value).splitlines() == [
        "--beta 0: wanted a finite number, more than 0.",
        "--label-smoothing 0.5: wanted 0 or more, less than 0.5.",
        "--top-k 0: wanted more than 0.",
    ]


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_a_setting_out_of_range_is_refused_by_name(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=BAD_SETTINGS[text]):
        load_config({}, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "optimizer_config: {weight_decay: 1}",
        "optimizer_config: {adam: {betas: [0.9]}}",
        "optimizer: sgd\noptimizer_config: {sgd: {nesterov: true}}",
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 10], warmpu: 3}",
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 10], warmup: -5}",
        "lr_schedule: {name: linear_schedule, arguments: [0.0, 1e-5, 0]}",
        "lr_schedule: {name: cosine_deacy, arguments: [1e-5, 10]}",
        "optimizer_config: {adamw: {wieght_decay: 1}}",  # of an optimizer that is not used
    ],
)
def test_what_no_optimizer_can_be_made_of_is_refused_before_anything_long(tmp_path, text):
    """Not even the model is looked at."""
    (tmp_path / "c.yaml").write_text(text + "\n")
    words = ["train", "-c", tmp_path / "c.yaml", "--model", tmp_path, "--data", tmp_path]
    done = CliRunner().invoke(main, [*map(str, words), "--objective", "dpo"])
    assert done.exit_code == 2, done.output
    assert "lr_schedule / optimizer_config" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resume_adapter_file: a/adapters.safetensors", "resume_adapter_file: write init_adapter"),
        ("train: true", "train: leave it out"),
        ("test: true\ntest_batches: 5", "test: leave it out.*test_batches: leave it out"),
        ("mask_prompt: true", "mask_prompt: leave it out"),
        ("use_dora: true", "use_dora: write fine_tune_type: dora"),
        ("shareprompt: true", "Did you mean share_prompt"),
    ],
)
def test_a_setting_that_mlx_lm_lora_alone_has_says_what_to_write(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)run\.yaml: .*{said}"):
        load_config({}, tmp_path / "run.yaml")


def test_null_is_a_setting_that_was_not_given_but_where_it_is_a_value(tmp_path):
    """As mlx_lm.lora has it."""
    nulls = "seed: null\nbeta:\nobjective:\nlora_parameters:\noptimizer_config: {adamw: }\n"
    nulls += "optimizer: adamw\nresume_adapter_file: null\nmask_prompt: null\nlr_schedule: null\n"
    (tmp_path / "run.yaml").write_text(f"{nulls}max_grad_norm: null\n")
    said = []
    config = load_config({}, tmp_path / "run.yaml", said.append)
    plain = load_config({})
    assert (config.train.seed, config.train.lora) == (plain.train.seed, plain.train.lora)
    assert (config.objective, config.asked, config.preset) == (plain.objective, set(), "fpo")
    assert (config.train.max_grad_norm, said) == (None, [])
    make_optimizer(config.train)
    (tmp_path / "run.yaml").write_text("sead: null\n")
    with pytest.raises(ConfigError, match="unknown settings sead"):
        load_config({}, tmp_path / "run.yaml")


def test_a_file_of_settings_that_is_not_there_and_a_schedule_that_is_none_are_said_so(tmp_path):
    with pytest.raises(ConfigError, match="c.yaml: no such file"):
        load_config({}, tmp_path / "c.yaml")
    schedule = {"name": "cosine_deacy", "arguments": [1e-5, 10]}
    with pytest.raises(ConfigError, match="no schedule cosine_deacy, known are .*cosine_decay"):
        make_optimizer(load_config({"lr_schedule": schedule}).train)


@pytest.mark.parametrize("path", list(leaves()), ids=lambda path: " ".join(path) or "main")
def test_the_help_of_every_command_shows_an_example(path):
    done = CliRunner().invoke(main, [*path, "--help"])
    assert done.exit_code == 0, done.output
    assert "\nExample:\n  fpo-mlx" in done.stdout
    if path:
        assert f"fpo-mlx {' '.join(path)}" in done.stdout


@pytest.mark.parametrize("path", list(leaves()), ids=lambda path: " ".join(path) or "main")
def test_every_option_has_a_help_text(path):
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_no_help_loads_mlx_or_torch():
    probe = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from fpo_mlx.cli import main\n"
        f"for path in {list(leaves())!r}:\n"
        "    assert CliRunner().invoke(main, [*path, '--help']).exit_code == 0, path\n"
        "heavy = {'mlx', 'mlx_lm', 'torch', 'transformers', 'datasets', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# Names under which the package holds a section of the settings; `t.iters`, `self.config.seed`.
HOLDERS = {"config", "train", "t", "objective", "o", "data", "d", "reference", "ref"}
PARTS = {"train", "objective", "data", "reference"}


def read_from(tree: ast.AST, holders: set[str]) -> set[str]:
    """Names of attributes that are read from something of one of these names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = node.value
            name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
            section = name == "config" and node.attr in PARTS  # `config.data` is no setting yet
            found |= {node.attr} if name in holders and not section else set()
    return found


def settings_read(sources: dict[str, str]) -> set[str]:
    """Settings read outside config/, directly or by a method of theirs that is used there."""
    outside = set()
    for name, source in sources.items():
        if not name.startswith("config/"):
            outside |= read_from(ast.parse(source), HOLDERS)
    for name, source in sources.items():
        for section in ast.walk(ast.parse(source)) if name.startswith("config/") else ():
            for method in section.body if isinstance(section, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and method.name in outside:
                    outside |= read_from(method, {"self"})
    return outside


@pytest.fixture(scope="module")
def read():
    return settings_read(
        {
            str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
            for path in PACKAGE.rglob("*.py")
        }
    )


@pytest.mark.parametrize("name", sorted(options()))
def test_every_setting_is_read_outside_of_config(read, name):
    assert name in read


def test_a_setting_that_nothing_reads_is_found():
    config = "class C:\n    def used(self): return self.a\n    def unused(self): return self.b\n"
    use = "def f(config, x):\n    config.used\n    x.c\n    config.train.d\n    config.e = 1\n"
    assert settings_read({"config/c.py": config, "use.py": use}) == {"used", "a", "d"}


def test_every_setting_is_in_one_section_only():
    names = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))


def test_numbers_with_an_exponent_are_numbers_in_lists_too(tmp_path):
    """PyYAML alone reads 1e-5 as text, and a schedule would fail far from its cause."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 1e-5\nlr_schedule: {name: cosine_decay, arguments: [2e-5, 1E3]}"
    )
    train = load_config({}, path).train
    assert train.learning_rate == 1e-5
    assert train.lr_schedule == {"name": "cosine_decay", "arguments": [2e-5, 1000.0]}
