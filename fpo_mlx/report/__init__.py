"""One offline HTML page about one or several training runs."""

from fpo_mlx.report.feature import render_feature as render_feature
from fpo_mlx.report.page import render as render
from fpo_mlx.report.read import read_runs as read_runs
