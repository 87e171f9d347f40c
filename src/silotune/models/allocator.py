"""Return freed memory to the system.

glibc keeps freed memory in gaps between allocations. Batches differ in length, so their activations
rarely fit into the gaps that earlier ones left, and the resident size grew from client to client:
by a third within two rounds of the recipe `hospitals`, although each client needs the same amount.
Giving everything back after every client costs more than it saves: the next client asks for the
same pages again, and the system clears each of them. So it is done when a process will rest or
change its work, and in between only if the process has grown.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

GROWN = 1.2
"""Growth since the first client, as a factor, from which memory is given back between clients."""

_after_first = 0
"""Bytes that this process held after the first client since the last `release_memory`. The heap
belongs to the process, so this does too; it decides when memory is returned, and no result."""


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's malloc_trim; None if it is not glibc."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_memory() -> None:
    """Return all unused pages. Takes milliseconds, and the next steps take longer; see above.

    Does nothing without glibc.
    """
    global _after_first
    _after_first = 0
    if (trim := _trim()) is not None:
        trim(0)


def release_if_grown() -> bool:
    """Between two clients: return unused pages if the process has grown by the factor `GROWN`.

    Returns:
        Whether it did.
    """
    global _after_first
    now = resident_bytes()
    if not _after_first:
        _after_first = now
    if now <= GROWN * _after_first:
        return False
    if (trim := _trim()) is not None:
        trim(0)
    return True


def resident_bytes() -> int:
    """Memory that this process holds, freed pages included; 0 where /proc does not say."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
