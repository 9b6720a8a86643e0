"""The report in a real browser: nothing asked for, nothing complained of, nothing too wide."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import browser
from report_runs import evil_runs

from fpo_mlx.report import read_runs, render

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no chromium on the PATH")


def test_chromium_opens_it_without_errors_requests_or_a_wide_phone_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(render(read_runs(evil_runs(tmp_path / "runs"))), encoding="utf-8")
    colours = set()
    with browser.opened(str(browser.find()), tmp_path / "profile") as tab:
        for width, dark in ((1200, False), (390, False), (320, True)):
            tab.open(page.as_uri(), width=width, dark=dark)
            asked = [event["request"]["url"] for event in tab.of("Network.requestWillBeSent")]
            assert asked == [page.as_uri()]
            assert tab.of("Runtime.consoleAPICalled") == []
            assert tab.of("Runtime.exceptionThrown") == []
            assert tab.of("Log.entryAdded") == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("document.scripts.length") == 0
            assert tab.evaluate("document.querySelectorAll('figure svg path').length") > 10
            colours.add((dark, tab.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert len({colour for _, colour in colours}) == 2  # light and dark


def test_the_browser_check_sees_errors_requests_and_wide_pages(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><div style='width:900px'>x</div>"
        "<img src='missing.png'><script>console.error('no')</script>"
    )
    with browser.opened(str(browser.find()), tmp_path / "profile") as tab:
        tab.open(page.as_uri(), width=390)
        assert len(tab.of("Network.requestWillBeSent")) == 2
        assert tab.of("Runtime.consoleAPICalled")
        assert tab.evaluate("document.documentElement.scrollWidth") > 390
