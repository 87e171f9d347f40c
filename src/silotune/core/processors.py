"""Which processors this process may use."""

import os


def usable_threads() -> int:
    """Number of processors that this process may use, which may be fewer in a container."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
