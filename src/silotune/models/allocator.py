"""Return freed memory to the system.

glibc keeps freed memory in gaps between allocations. Batches differ in length, so their activations
rarely fit into the gaps that earlier ones left, and the resident size grew from client to client:
by a third within two rounds of the recipe `hospitals`, although each client needs the same amount.
"""

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's malloc_trim; None if it is not glibc."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_memory() -> None:
    """Return all unused pages. Takes milliseconds; does nothing without glibc."""
    if (trim := _trim()) is not None:
        trim(0)
