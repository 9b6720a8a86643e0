"""An adapter that began from another one, judged without --init-adapter: it is said."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("mlx.core")

from command_line import run, usual  # noqa: E402
from evaluated import own_cache, place  # noqa: E402, F401

EVALUATE = ("evaluate", "--samples", 0, "--no-kl")
SAID = "began from the adapter"


@pytest.fixture
def went_on(place, tmp_path):  # noqa: F811
    """The adapter "two", which says that it began from "one"; with a space in its name."""
    shutil.copytree(place / "one", tmp_path / "an sft")
    shutil.copytree(place / "two", tmp_path / "dpo")
    record = {"settings": {"init_adapter": str(tmp_path / "an sft")}}
    (tmp_path / "dpo" / "run.json").write_text(json.dumps(record))
    return tmp_path / "dpo"


@pytest.mark.parametrize("command", [EVALUATE, ("features",), ("features", "show", 1)])
def test_an_adapter_judged_without_its_start_is_named_with_the_option(place, went_on, command):  # noqa: F811
    sft = went_on.parent / "an sft"
    words = [*command, *usual(place), "--split", "valid", "--adapter-path", went_on]
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count(f"{went_on} {SAID} {sft}") == 1
    assert f"--init-adapter '{sft}'" in done.stderr
    done = run(*words, "--init-adapter", sft)
    assert done.exit_code == 0, done.stderr
    assert SAID not in done.stderr


def test_an_adapter_without_a_start_is_judged_without_a_word_of_one(place):  # noqa: F811
    done = run(*EVALUATE, *usual(place), "--split", "valid", "--adapter-path", place / "one")
    assert done.exit_code == 0, done.stderr
    assert SAID not in done.stderr
