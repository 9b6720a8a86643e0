"""Runs -> one HTML page that needs nothing else: no script, no request, every value escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fpo_mlx import __version__
from fpo_mlx.errors import ConfigError
from fpo_mlx.report import findings, rounds, samples, tables
from fpo_mlx.report.plots import COLOURS, draw_all
from fpo_mlx.report.read import Run

TEMPLATE = Path(__file__).with_name("report.html")


def render(runs: Sequence[Run], made: str = "") -> str:
    """The page of these runs. made: when, for its foot.

    Raises: ConfigError where matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2

        plots = draw_all(runs)
    except ImportError as error:
        raise ConfigError(
            f"a report needs {error.name}, which is not installed here: run "
            f"`pip install {error.name}`."
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
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
        warnings=findings.warnings(runs),
        missing=findings.missing(runs),
        memory=tables.memory(runs),
        given=given,
        rest=rest,
        fingerprints=tables.fingerprints(runs),
    )
