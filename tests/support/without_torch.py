"""The command line as on a machine without torch: a Mac has none, and its start costs seconds."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # an import fails: not installed

from fpo_mlx.cli import main  # noqa: E402

main(sys.argv[1:])
