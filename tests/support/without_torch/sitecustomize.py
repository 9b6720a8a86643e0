"""On the path of a process: torch counts as not installed. Importing it costs seconds."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
