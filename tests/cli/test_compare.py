"""`fpo-mlx compare`: the same prompts, answered in the same way, side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core")

from command_line import ROWS, lines, refused, run  # noqa: E402
from evaluated import adapter  # noqa: E402
from tiny_models import tiny_llama  # noqa: E402

from fpo_mlx.cli.compare import shown  # noqa: E402
from fpo_mlx.cli.show import cells, wrapped  # noqa: E402
from fpo_mlx.config import Sampling  # noqa: E402
from fpo_mlx.pipeline import Comparison  # noqa: E402
from fpo_mlx.pipeline.wins import Wins  # noqa: E402
from fpo_mlx.storage.files import sha256_of  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    tiny_llama(root / "model", tokenizer=True)
    lines(root / "data" / "valid.jsonl", *ROWS, {**ROWS[0], "chosen": "Other."})
    for i, name in enumerate(("one", "two")):
        (root / name).mkdir()
        adapter(root / name, root / "model", i)
    return root


def compare(place, *words, code=0):
    flags = ["--model", place / "model", "--adapter-path", place / "one", "--max-tokens", 6]
    done = run("compare", *flags, *words)
    assert done.exit_code == code, done.stderr
    return done


def test_prompts_of_a_split_are_answered_once_each_by_every_model(place, tmp_path):
    words = ["--data", place / "data", "--count", 9, "--adapter-path", place / "two"]
    compare(place, *words, "--output", tmp_path / "c.json")
    got = json.loads((tmp_path / "c.json").read_text())
    assert got["sampling"] == {"max_tokens": 6, "temp": 0.0, "seed": 0}
    assert [row["prompt"] for row in got["prompts"]] == [row["prompt"] for row in ROWS]
    names = ["base", str(place / "one"), str(place / "two")]
    assert all(list(row["answers"]) == names for row in got["prompts"])
    assert got["adapter_sha256"] == {
        name: sha256_of(Path(name) / "adapters.safetensors") for name in names[1:]
    }
    assert len({tuple(row["answers"].values()) for row in got["prompts"]}) > 1
    assert any(len(set(row["answers"].values())) == 3 for row in got["prompts"])


def test_as_many_prompts_of_a_file_are_asked_as_count_says(place, tmp_path):
    (tmp_path / "p.txt").write_text("Third?\nFourth?\nFifth?\n")
    compare(place, "--prompts", tmp_path / "p.txt", "--count", 2, "--output", tmp_path / "c.json")
    got = json.loads((tmp_path / "c.json").read_text())
    assert [row["prompt"] for row in got["prompts"]] == ["Third?", "Fourth?"]


def test_given_prompts_and_those_of_a_file_are_asked_in_order(place, tmp_path):
    (tmp_path / "p.txt").write_text("Third?\n\nFourth?\n")
    lines(tmp_path / "p.jsonl", {"prompt": "Third?"}, {"prompt": "Fourth?", "chosen": "x"})
    results = []
    for name in ("p.txt", "p.jsonl"):
        words = ["--prompt", "First?", "--prompt", "Second?", "--prompts", tmp_path / name]
        done = compare(place, *words, "--output", tmp_path / f"{name}.c.json")
        results.append(json.loads((tmp_path / f"{name}.c.json").read_text())["prompts"])
        for text in ("First?", "Second?", "Third?", "Fourth?"):
            assert text in done.stdout
    assert results[0] == results[1]
    assert [r["prompt"] for r in results[0]] == ["First?", "Second?", "Third?", "Fourth?"]


def test_without_a_temperature_the_likeliest_tokens_are_taken_whatever_the_seed(place, tmp_path):
    got = []
    for i, words in enumerate((["--seed", 3], ["--seed", 4], ["--temp", 0])):
        compare(place, "--prompt", "A?", *words, "--output", tmp_path / f"{i}.json")
        got.append(json.loads((tmp_path / f"{i}.json").read_text())["prompts"])
    assert got[0] == got[1] == got[2]


def test_an_answer_that_was_cut_at_its_limit_is_marked_wherever_it_is_read(place, tmp_path):
    """It looked like an answer that stops in the middle of a sentence."""
    base, one = "base", str(place / "one")
    for suffix in ("json", "md"):
        done = compare(place, "--prompt", "A?", "--output", tmp_path / f"c.{suffix}")
    (row,) = json.loads((tmp_path / "c.json").read_text())["prompts"]
    assert row["cut"] == [base, one]
    assert all("[cut" not in text for text in row["answers"].values())
    assert done.stdout.count("[cut after 6 tokens]") == 2
    assert (tmp_path / "c.md").read_text().count("[cut after 6 tokens]") == 2
    assert "2 answers" in done.stderr


def test_an_answer_that_came_to_its_end_has_no_mark():
    cut = {"base": (False, True), "a": (False, False)}
    result = Comparison(("Q?", "R?"), {"base": ("x", "y"), "a": ("x", "y")}, Sampling(9), {}, cut)
    assert result.told(0) == {"base": "x", "a": "x"}
    assert result.told(1) == {"base": "y\n[cut after 9 tokens]", "a": "y"}
    assert [row["cut"] for row in result.as_dict()["prompts"]] == [[], ["base"]]
    assert all("cut" not in row for row in RESULT.as_dict()["prompts"])  # which nobody knows


def test_equal_seeds_give_equal_answers(place, tmp_path):
    got = []
    for i, seed in enumerate((3, 3, 4)):
        out = tmp_path / f"{i}.json"
        compare(place, "--prompt", "A?", "--temp", 1, "--seed", seed, "--output", out)
        got.append(json.loads(out.read_text())["prompts"])
    assert got[0] == got[1] != got[2]


def test_an_adapter_that_changes_nothing_answers_as_the_base(place, tmp_path):
    """The same noise for both: a difference is the adapter's."""
    (tmp_path / "zero").mkdir()
    adapter(tmp_path / "zero", place / "model", 0, size=0.0)
    words = ["--adapter-path", tmp_path / "zero", "--prompt", "A?", "--prompt", "B?"]
    compare(place, *words, "--output", tmp_path / "c.json")
    for row in json.loads((tmp_path / "c.json").read_text())["prompts"]:
        answers = row["answers"]
        assert answers["base"] == answers[str(tmp_path / "zero")] != answers[str(place / "one")]


def test_adapters_in_a_folder_called_base_are_not_taken_for_the_base(place, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "one", "base")
    words = ["--model", place / "model", "--max-tokens", 6, "--prompt", "A?", "--output", "c.json"]
    done = run("compare", *words, "--adapter-path", "base")
    assert done.exit_code == 0, done.stderr
    compare(place, "--prompt", "A?", "--output", tmp_path / "d.json")
    own, usual = (json.loads((tmp_path / f"{n}.json").read_text())["prompts"] for n in "cd")
    assert list(own[0]["answers"]) == ["base", "./base"]
    assert list(own[0]["answers"].values()) == list(usual[0]["answers"].values())


def test_a_prompt_may_hold_any_of_unicodes_line_ends(place, tmp_path):
    prompt = "One\u2028two\u0085three\x0cfour?"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\r\n")
    compare(place, "--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "c.json")
    assert [r["prompt"] for r in json.loads((tmp_path / "c.json").read_text())["prompts"]] == [
        prompt
    ]


REWARD = """
def longer(prompt, answer):
    return len(answer)

def fails(prompt, answer):
    raise ValueError("no answer is good enough")
"""


def test_a_reward_counts_how_often_an_adapter_beats_the_base(place, tmp_path):
    (tmp_path / "my.py").write_text(REWARD)
    (tmp_path / "zero").mkdir()
    adapter(tmp_path / "zero", place / "model", 0, size=0.0)
    words = ["--prompt", "A?", "--prompt", "B?", "--adapter-path", tmp_path / "zero"]
    words += ["--reward", f"{tmp_path / 'my.py'}:longer", "--output", tmp_path / "c.json"]
    done = compare(place, *words)
    got = json.loads((tmp_path / "c.json").read_text())
    one, same = got["wins"].values()
    pairs = [list(row["answers"].values()) for row in got["prompts"]]
    assert one["wins"] == sum(len(two) > len(base) for base, two, _ in pairs)
    assert one["losses"] == sum(len(two) < len(base) for base, two, _ in pairs)
    assert (same["wins"], same["ties"], same["losses"], same["rate"]) == (0, 2, 0, 0.5)
    assert f"{tmp_path / 'zero'} against the base by" in done.stdout
    assert "0 wins, 2 ties, 0 losses, 50% [" in done.stdout


def test_a_reward_that_fails_costs_the_wins_and_not_the_answers(place, tmp_path):
    (tmp_path / "my.py").write_text(REWARD)
    words = ["--prompt", "A?", "--reward", f"{tmp_path / 'my.py'}:fails"]
    done = compare(place, *words, "--output", tmp_path / "c.json")
    assert "warning: no wins are counted (prompts by number): id 1:" in done.stderr
    assert "no answer is good enough" in done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["wins"] == {}


def test_the_limits_of_a_reward_are_the_commands_own(place, tmp_path):
    """They were those of `pairs judge`, whatever the reward wants."""
    (tmp_path / "my.py").write_text("import time\ndef slow(prompt, answer):\n    time.sleep(30)\n")
    words = ["--prompt", "A?", "--reward", f"{tmp_path / 'my.py'}:slow", "--timeout", 0.3]
    done = compare(place, *words, "--memory-gb", 1, "--output", tmp_path / "c.json")
    assert "longer than 0.3 seconds" in done.stderr
    body = "raise ValueError(resource.getrlimit(resource.RLIMIT_AS)[0])"
    (tmp_path / "my.py").write_text(f"import resource\ndef limit(prompt, answer):\n    {body}\n")
    words = ["--prompt", "A?", "--reward", f"{tmp_path / 'my.py'}:limit", "--memory-gb", 9]
    done = compare(place, *words)
    assert "ValueError: 9000000000" in done.stderr or sys.platform == "darwin"


def test_the_interval_of_few_wins_leaves_room_for_losses():
    """Wilson's: at either end the share found is 1.96 standard errors off."""
    for end in Wins(81, 0, 182).interval:
        assert abs(81 / 263 - end) == pytest.approx(1.959964 * (end * (1 - end) / 263) ** 0.5)
    low, high = Wins(5, 0, 0).interval
    assert low == pytest.approx(5 / (5 + 1.959964**2))
    assert high == pytest.approx(1.0)
    assert Wins(1, 2, 1).rate == 0.5


BAD_ANSWER = "a | b\n<script>x</script> `code`"
RESULT = Comparison(("Q | <b>?",), {"base": (BAD_ANSWER,), "a|b": ("",)}, Sampling())


def test_what_a_model_wrote_cannot_break_the_markdown_table():
    lines_ = RESULT.markdown().splitlines()
    assert lines_[0] == "## Q &#124; &lt;b>?"
    row = lines_[-1]
    assert row.startswith("| a &#124; b<br>&lt;script>x&lt;/script> &#96;code&#96; | (nothing) |")
    assert "<script" not in RESULT.markdown()


def test_wide_terminals_get_columns_and_narrow_ones_get_rows():
    answers = {"base": "one two three", "a": "\x1b[2Jfour\nfive"}
    wide = list(shown("Q?", answers, 80))
    assert any("one two three" in line and "four" in line for line in wide)
    narrow = list(shown("Q?", answers, 30))
    assert narrow.index("one two three") < narrow.index("[a]")
    assert all(len(line) <= 80 for line in wide)
    assert not any("\x1b" in line for line in wide + narrow)


def test_a_column_keeps_the_end_of_a_long_name():
    answers = {"base": "a"} | {f"runs/of/last/week/adapters-{n}": "b" for n in (3, 4)}
    (header,) = [line for line in shown("Q?", answers, 88) if line.startswith("[base]")]
    assert "[…s/of/last/week/adapters-3]  […s/of/last/week/adapters-4]" in header


@pytest.mark.parametrize("width", [30, 80])
def test_wide_characters_and_tabs_take_the_room_that_they_take_on_the_terminal(width):
    answers = {"base": "東京は日本の首都です。" * 5, "a": "one\ttwo " * 9}
    lines_ = list(shown("猫" * 60, answers, width))
    assert all(cells(line) <= width for line in lines_)
    assert "".join(lines_).count("猫") == 60
    assert "".join(lines_).count("東") == 5
    if width == 80:
        starts = {cells(line[: line.index("one")]) for line in lines_ if "one" in line}
        assert starts == {41}


def test_a_line_is_broken_at_spaces_and_a_word_only_where_it_is_wider_than_the_line():
    assert wrapped("  two words, Supercalifragilistic here", 12) == [
        "  two words,", "Supercalifra", "gilistic", "here",
    ]  # fmt: skip
    assert wrapped("", 12) == [""]


BAD = {
    "no prompts": ([], 2, ("no prompts", "--prompt")),
    "no adapter": (["--prompt", "A?"], 2, ("--adapter-path is missing",)),
    "no such file": (["--prompts", "none.txt"], 1, ("none.txt", "cannot be read")),
    "suffix": (["--prompt", "A?", "--output", "x.txt"], 2, ("x.txt", ".json or .md")),
    "too long": (["--prompt", "A? " * 50, "--max-seq-length", "9"], 3, ("--max-seq-length 9",)),
    "no such reward": (["--prompt", "A?", "--reward", "kindness"], 2, ("--reward kindness",)),
    "limit alone": (["--prompt", "A?", "--timeout", "5"], 2, ("--timeout", "add --reward")),
    "bad limit": (
        ["--prompt", "A?", "--reward", "brevity", "--memory-gb", "0"],
        2,
        ("--memory-gb 0",),
    ),
    "no number": (["--prompt", "A?", "--adapter-scale", "nan"], 2, ("--adapter-scale",)),
    "no data": (["--data", "nowhere.jsonl"], 1, ("nowhere.jsonl", "no such file")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_plain_message(place, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, code, parts = BAD[case]
    given = [] if case == "no adapter" else ["--adapter-path", place / "one"]
    refused(run("compare", "--model", place / "model", *given, *words), code, *parts)
    assert list(tmp_path.iterdir()) == []


def test_the_part_of_an_adapter_that_answers_is_named(place, tmp_path):
    words = ["--prompt", "A?", "--adapter-scale", "0.5", "--output", tmp_path / "a.json"]
    done = run(
        "compare", "--model", place / "model", "--adapter-path", place / "one",
        "--max-tokens", "3", *words,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads((tmp_path / "a.json").read_text())["prompts"]
    assert [name.endswith("one*0.5") for name in row["answers"]] == [False, True]


def test_bad_lines_of_a_prompts_file_are_named(place, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n{"prompt": 3}\nno\n')
    words = ["--adapter-path", place / "one", "--prompts", tmp_path / "p.jsonl"]
    result = run("compare", "--model", place / "model", *words)
    refused(result, 3, "p.jsonl:2", "p.jsonl:3", "p.jsonl:4")
