"""What a command found is on the screen before it is written: a file that fails takes nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

from command_line import ROWS, lines, run, usual  # noqa: E402
from evaluated import K, own_cache, place  # noqa: E402, F401


def words_of(command, place, out):
    """(words, whose last is the option of a file; a part of what is shown)."""
    model, adapter = ["--model", place / "model"], ["--adapter-path", place / "one"]
    seen = [*usual(place), "--split", "valid"]
    texts = ("positive", "negative")
    for i, name in enumerate(texts):
        lines(out / name, *({"text": f"{'Quite another thing' * i} word {n}"} for n in range(9)))
    find = [word for name in texts for word in (f"--{name}", out / name)]
    many = lines(out / "many.jsonl", *({**ROWS[n % 4], "prompt": f"{n}?"} for n in range(24)))
    return {
        "evaluate": (["evaluate", *seen, *adapter, "--samples", 0, "--json"], "rewards/margins"),
        "features": (["features", *seen, *adapter, "--top-k", K, "--json"], "mean D"),
        "features data": (["features", "data", *usual(place, data=many), "--csv"], "pairs;"),
        "find": (["features", "find", *usual(place, data=None), *find, "--output"], "held out"),
        "show": (["features", "show", 3, *seen, "--json"], "density"),
        "compare": (
            ["compare", *model, *adapter, "--prompt", "A?", "--max-tokens", 2, "--output"],
            "[base]",
        ),
        "sae evaluate": (["sae", "evaluate", *usual(place), "--json"], "dead"),
        "fuse": (["fuse", *model, *adapter, "--save-path", out / "fused", "--json"], "layers"),
    }[command]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    ["evaluate", "features", "features data", "find", "show", "compare", "sae evaluate", "fuse"],
)
def test_what_was_found_is_shown_where_its_file_cannot_be_written(place, tmp_path, command):
    """Hours of it were lost."""
    (tmp_path / "file").write_text("")
    words, part = words_of(command, place, tmp_path)
    result = run(*words, tmp_path / "file" / "x.json")
    assert result.exit_code == 1, result.output
    assert "x.json cannot be written" in result.stderr
    assert part in result.stdout
