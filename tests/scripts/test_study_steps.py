"""scripts/studies/texts.py: steps that outlive a killed process, and who made them."""

from __future__ import annotations

import json
import subprocess

import pytest
import texts


def test_a_step_is_made_once_and_says_which_commit_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "commit_of", lambda folder: "abc123+")
    steps = texts.Steps(tmp_path, {"of": "this"})
    assert [steps("one", lambda: 1), steps("one", lambda: 2), steps("two", lambda: 3)] == [1, 1, 3]
    made = [json.loads(line) for line in (steps.folder / "made.jsonl").read_text().splitlines()]
    assert [(row["step"], row["commit"]) for row in made] == [
        ("one", "abc123+"),
        ("two", "abc123+"),
    ]
    assert steps.values() == {"one": 1, "two": 3}
    with pytest.raises(SystemExit, match="begun with other settings"):
        texts.Steps(tmp_path, {"of": "that"})


def test_a_commit_with_changed_scripts_is_marked_and_no_checkout_has_none(tmp_path):
    assert texts.commit_of(tmp_path / "nowhere") is None
    script = tmp_path / "scripts" / "a.py"
    script.parent.mkdir()
    script.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "notes.md").write_text("no matter")
    commit = texts.commit_of(tmp_path)
    assert commit
    assert len(commit) == 10
    script.write_text("2")
    assert texts.commit_of(tmp_path) == f"{commit}+"
