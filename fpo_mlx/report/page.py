"""Runs -> one HTML page that needs nothing else: no script, no request, every value escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpo_mlx import __version__
from fpo_mlx.errors import ConfigError, pip_install
from fpo_mlx.report import findings, rounds, samples, tables, verdict
from fpo_mlx.report.plots import COLOURS, draw_all
from fpo_mlx.report.read import Run

TEMPLATES = Path(__file__).parent


def render(runs: Sequence[Run], made: str = "") -> str:
    """The page of these runs. made: when, for its foot.

    Raises: ConfigError where matplotlib or jinja2 is not installed.
    """
    template = environment().get_template("report.html")
    try:
        plots = draw_all(runs)
    except ImportError as error:
        raise _lacking(error) from error
    given, rest = tables.settings(runs)
    evaluation, figures = tables.evaluation(runs)
    return template.render(
        title=" · ".join(run.name for run in runs),
        version=__version__,
        made=made,
        cards=[tables.card(run, i % COLOURS) for i, run in enumerate(runs)],
        plots=plots,
        evaluation=evaluation,
        figures=figures,
        rounds=rounds.rounds(runs),
        curves=[t for run in runs if (t := tables.curves(run))],
        features=[t for run in runs if (t := samples.features(run))],
        answers=[a for run in runs if (a := samples.answers(run))],
        verdicts=[(run.name, verdict.held_out(run)) for run in runs if run.train or run.valid],
        warnings=findings.warnings(runs),
        missing=findings.missing(runs),
        memory=tables.memory(runs),
        given=given,
        rest=rest,
        fingerprints=tables.fingerprints(runs),
    )


def environment() -> Any:
    """The templates of this folder, everything escaped. Raises: ConfigError without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise _lacking(error) from error
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )  # fmt: skip


def _lacking(error: ImportError) -> ConfigError:
    return ConfigError(
        f"a report needs {error.name}, which is not installed here: run "
        f"`{pip_install(str(error.name))}`."
    )
