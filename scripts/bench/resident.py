"""What a process had in memory at most; plain Python, also for the rivals' own environments."""

import resource
import sys


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The system counts in KiB, but for a Mac's, which counts in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own_peak_bytes() -> int:
    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
