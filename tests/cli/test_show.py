"""What is printed: ordinary text whole, nothing that moves the cursor, columns that stay."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from fpo_mlx.cli import show

JOINED = "नमस्ते क्‍ष می‌خواهم 👩‍🚀 soft­hyphen 東京\u3000\u00a0"


def test_ordinary_text_of_any_language_is_printed_as_it_is():
    text = f"{JOINED}\ncolumn\tcolumn"
    assert show.printable(text) == text


@pytest.mark.parametrize("char", ["\x1b", "\r", "\x9b", "\x7f", "\u202e", "\u2066", "\ud800"])
def test_what_moves_the_cursor_or_turns_the_line_around_is_a_space(char):
    assert show.printable(f"a{char}b") == "a b"


def test_a_text_on_one_line_has_no_tab_and_no_end_of_line():
    assert show.one_line("a\tb\nc\u2028d\x1b[2J") == "a b c d [2J"


def test_a_table_has_no_control_characters_and_columns_by_what_a_terminal_shows(capsys):
    show.table([("feature", "label", "n"), ("東京", "cat\x1b[31m\n", 1), ("ab", "e\u0301", 2)])
    assert capsys.readouterr().out.splitlines() == [
        "feature  label      n",
        "東京     cat [31m   1",
        "ab       e\u0301          2",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def pairs_of(bar):
    return lambda done, total: bar(SimpleNamespace(pairs=done, total_pairs=total))


@pytest.mark.parametrize(
    "made", [lambda: pairs_of(show.Bar("reference")), lambda: show.Steps("answers")]
)
def test_a_bar_is_gone_when_all_is_done_and_the_next_work_has_its_own(monkeypatch, made):
    """The next line was put behind it, and it was drawn again above the bar of the training."""
    terminal, bar = Terminal(), made()
    monkeypatch.setattr(sys, "stderr", terminal)
    for total in (2, 3):
        for done in range(1, total + 1):
            bar(done, total)
            assert (terminal.getvalue()[-1] == "\r") is (done == total)  # an empty line
        assert f"0/{total}" in terminal.getvalue()
