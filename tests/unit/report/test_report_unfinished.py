"""A run that is not at its end is named, whatever said how long it is."""

from __future__ import annotations

import pytest
from report_runs import a_run

from fpo_mlx.report.findings import warnings
from fpo_mlx.report.read import read_runs


@pytest.mark.parametrize(
    ("settings", "known", "told"),
    [
        ({"iters": None}, {"iterations": 1000}, "The last report is of iteration 30 of 1000."),
        ({"iters": None}, {"iterations": 30}, None),
        ({"iters": None}, {}, None),  # of an older version
        ({"iters": 40}, {}, "of iteration 30 of 40."),
        ({"iters": None, "early_stopping": 3}, {"iterations": 1000}, "of 1000 (--early-stopping"),
    ],
)
def test_a_run_that_is_not_at_its_end_is_named_however_long(tmp_path, settings, known, told):
    """Of the default length, or of passes, it was taken for finished."""
    run = a_run(tmp_path / "run", record={"settings": settings, **known})
    found = "\n".join(warning.text for warning in warnings(read_runs([run])))
    assert ("The last report is of" in found) is (told is not None)
    assert (told or "") in found
