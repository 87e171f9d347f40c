"""Freed memory leaves the process, even from below memory that is held; but not all the time."""

import pytest

from silotune.models import allocator
from silotune.models.allocator import _trim, release_if_grown, release_memory, resident_bytes

needs_glibc = pytest.mark.skipif(_trim() is None, reason="only glibc gives memory back on request")


def below_something_held():
    """128 MB in small pieces, of which the last is kept; yields after they are freed."""
    # small enough for the heap, which only shrinks from its end automatically
    held = [b"x" * 65_536 for _ in range(2000)]
    last = held.pop()
    yield resident_bytes()
    held.clear()
    yield resident_bytes()
    assert len(last) == 65_536


@needs_glibc
def test_what_is_freed_below_something_held_goes_back_to_the_system():
    steps = below_something_held()
    before = next(steps)
    next(steps)
    release_memory()
    assert before - resident_bytes() > 2000 * 65_536 * 0.8
    assert not list(steps)


@needs_glibc
def test_between_clients_it_goes_back_only_if_the_process_has_grown(monkeypatch):
    monkeypatch.setattr(allocator, "GROWN", 1.0)
    release_memory()
    assert not release_if_grown(), "the first client is what the others are compared with"
    steps = below_something_held()
    before = next(steps)
    next(steps)
    assert release_if_grown()
    assert before - resident_bytes() > 2000 * 65_536 * 0.8
    assert not list(steps)
    monkeypatch.setattr(allocator, "GROWN", 1e9)
    assert not release_if_grown()


def test_growth_is_counted_from_the_first_client_since_everything_was_given_back(monkeypatch):
    sizes, trimmed = iter([100, 119, 121, 119, 200, 230, 250]), []
    monkeypatch.setattr(allocator, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(allocator, "_trim", lambda: trimmed.append)
    release_memory()
    trimmed.clear()
    assert [release_if_grown() for _ in range(4)] == [False, False, True, False]
    assert len(trimmed) == 1
    release_memory()
    assert [release_if_grown() for _ in range(3)] == [False, False, True]


def test_releasing_twice_is_no_mistake():
    release_memory()
    release_memory()
