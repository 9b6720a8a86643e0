"""Runs -> an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from fpo_mlx.errors import FpoError
from fpo_mlx.storage import files


def report_page(runs: Sequence[Path], results: Sequence[Path] = ()) -> str:
    """The page of these run folders. Raises: as `report`, but for the place."""
    from fpo_mlx import report as pages

    return pages.render(pages.read_runs(runs, results), made=f"{datetime.now():%Y-%m-%d %H:%M}")


def verdict(run: Path, *, commands: bool = True) -> list[str]:
    """What a run's own validations say of it, and (commands) the next commands, line by line.

    A run that is done fails by nothing that is in its folder.
    """
    from fpo_mlx.report.read import read_run
    from fpo_mlx.report.verdict import measured
    from fpo_mlx.report.verdict import verdict as lines_of

    try:
        return (lines_of if commands else measured)(read_run(run, run.name))
    except FpoError as error:
        return [f"no verdict: {error}"]


def report(runs: Sequence[Path], output: Path, results: Sequence[Path] = ()) -> Path:
    """Write the page of these run folders; gives its path.

    Raises: FpoError for a folder without a run or a place that cannot be written to.
    """
    files.write_text(output, report_page(runs, results))
    return output
