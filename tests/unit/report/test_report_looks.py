"""How pages are set: headings in order, axes without strays, texts from their own side."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import browser
from report_runs import SUMMARY, a_run

from fpo_mlx.report import read_runs, render, render_feature
from fpo_mlx.report.plots import Line, draw

ARABIC = "مرحبا بالعالم."
SHOWN = {"compare": {"prompts": [{"prompt": "Hello?", "answers": {"base": "Hm.", "new": ARABIC}}]}}
SIDE = {"density": 0.5, "texts": 1, "mean_active": 1, "largest": 2, "chosen": 1, "rejected": 1,
        "counts": [3, 2], "top": 2.0}  # fmt: skip
FEATURE = {
    "feature": 7, "label": "", "sae": "s", "site": "resid_post of block 1", "model": "m",
    "adapter_path": None, "link": None, "pairs": 2, "split": "valid", "before": SIDE,
    "after": None, "promoted": [], "suppressed": [], "similar": [],
    "contexts": [{"activation": 1.5, "token": "ب", "text": "مرح«ب»ا.", "where": "pair 0, chosen"}],
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_no_heading_is_more_than_one_level_below_the_one_before(tmp_path, count):
    runs = [
        a_run(tmp_path / f"run{n}", **SHOWN, evaluate={"summary": SUMMARY}) for n in range(count)
    ]
    levels = [int(level) for level in re.findall(r"<h(\d)", render(read_runs(runs)))]
    assert levels[0] == 1
    assert max(levels) == count + 2
    assert [pair for pair in zip(levels, levels[1:], strict=False) if pair[1] > pair[0] + 1] == []


def test_one_more_figure_is_one(tmp_path):
    run = a_run(tmp_path / "run", evaluate={"summary": SUMMARY | {"other/figure": 1.0}})
    assert "<summary>1 more figure</summary>" in render(read_runs([run]))


def test_a_logarithmic_axis_has_no_stray_marks_between_its_numbers():
    svg = draw([Line((1, 2, 3), (0.01, 1, 1000), 0)], log=True, prefix="c")
    assert "10" in svg
    assert "<use" not in svg  # what a tick's mark is drawn by


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on the PATH")
def test_right_to_left_texts_are_set_from_the_right(tmp_path):
    run = a_run(tmp_path / "run", **SHOWN)
    pages = {
        ".sides div:last-child p": render(read_runs([run])),
        ".texts bdi": render_feature(FEATURE),
    }
    with browser.opened(str(browser.find()), tmp_path / "profile") as tab:
        for place, html in pages.items():
            page = tmp_path / "page.html"
            page.write_text(html, encoding="utf-8")
            tab.open(page.as_uri())
            # where the full stop stands: an end of the text, the left one
            script = f"""(() => {{ const e = document.querySelector('{place}');
                const text = e.lastChild, range = document.createRange();
                range.setStart(text, text.length - 1); range.setEnd(text, text.length);
                const whole = document.createRange(); whole.selectNodeContents(e);
                return range.getBoundingClientRect().left - whole.getBoundingClientRect().left;
            }})()"""
            assert tab.evaluate(script) == pytest.approx(0, abs=1), place
            assert tab.of("Runtime.exceptionThrown") == []
