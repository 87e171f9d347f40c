"""Freed memory leaves the process, even from below memory that is still held."""

import os
from pathlib import Path

import pytest

from silotune.models.allocator import _trim, release_memory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(_trim() is None, reason="only glibc gives memory back on request")
def test_what_is_freed_below_something_held_goes_back_to_the_system():
    # small enough for the heap, which only shrinks from its end automatically
    held = [b"x" * 65_536 for _ in range(2000)]
    last = held.pop()
    before = resident_bytes()
    held.clear()
    release_memory()
    assert before - resident_bytes() > 2000 * 65_536 * 0.8
    assert len(last) == 65_536


def test_releasing_twice_is_no_mistake():
    release_memory()
    release_memory()
