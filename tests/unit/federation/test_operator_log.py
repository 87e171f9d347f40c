"""The log of operators: what its chain and its signatures show, and what they do not."""

import json
import os
import stat

import pytest

from silotune.deployment.consortium.certificates import new_key, read_key, write_key
from silotune.federation.operator_log import (
    FILE,
    HEAD,
    LogError,
    entries,
    record,
    record_new_key,
    verify,
)


@pytest.fixture
def folder(tmp_path):
    write_key(tmp_path / "key.pem", new_key())
    for name in ("north", "south", "west"):
        record(tmp_path, "approve", client=name)
    return tmp_path


def lines_of(folder) -> list[bytes]:
    return (folder / FILE).read_bytes().splitlines(keepends=True)


def put(folder, lines) -> None:
    (folder / FILE).write_bytes(b"".join(lines))


def test_a_log_says_what_was_done_in_order_and_nobody_else_may_read_it(folder):
    found = verify(folder)
    assert found.lines == 3
    assert [row["client"] for row in entries(folder, "approve")] == ["north", "south", "west"]
    assert stat.S_IMODE(os.stat(folder / FILE).st_mode) == 0o600
    assert verify(folder / FILE) == found


def test_a_folder_without_a_key_has_no_log(tmp_path):
    record(tmp_path, "bundle refused", why="x")
    assert list(tmp_path.iterdir()) == []
    assert entries(tmp_path) == []


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("key", ["client", "time", "user", "what", "n", "before", "signature"])
def test_a_changed_line_is_found_and_named(folder, at, key):
    lines = lines_of(folder)
    row = json.loads(lines[at])
    row[key] = 7 if key == "n" else "00" if key == "signature" else "x"
    lines[at] = json.dumps(row).encode() + b"\n"
    put(folder, lines)
    with pytest.raises(LogError, match=f"line {at + 1}"):
        verify(folder)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 2), (1, 2), (0, 1, 1, 2)])
def test_moved_removed_and_doubled_lines_are_found(folder, order):
    lines = lines_of(folder)
    put(folder, [lines[at] for at in order])
    (folder / HEAD).unlink()
    with pytest.raises(LogError, match="line"):
        verify(folder)


def test_an_added_line_of_another_key_is_found(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    put(other, lines_of(folder))
    write_key(other / "key.pem", new_key())
    record(other, "approve", client="evil")
    with pytest.raises(LogError, match="line 4: its signature is not valid"):
        verify(other)


def test_a_cut_line_is_found_and_the_next_one_is_still_written(folder):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-20])
    with pytest.raises(LogError, match="line 3: it is cut"):
        verify(folder)
    record(folder, "approve", client="east")
    assert entries(folder, "approve")[-1]["client"] == "east"
    with pytest.raises(LogError, match="line 3: it is not a line"):
        verify(folder)


def test_missing_lines_at_the_end_are_found_by_the_head_or_by_a_hash_that_was_noted(folder):
    noted = verify(folder).head
    put(folder, lines_of(folder)[:2])
    with pytest.raises(LogError, match=r"has 2 lines, but .* knows of line 3"):
        verify(folder)
    (folder / HEAD).unlink()
    assert verify(folder).lines == 2, "the lines alone cannot show it: docs/deploy.md says so"
    with pytest.raises(LogError, match="does not hold the line"):
        verify(folder, seen=noted)
    record(folder, "approve", client="east")
    with pytest.raises(LogError, match="does not hold the line"):
        verify(folder, seen=noted)


def test_a_hash_that_was_noted_earlier_is_found_in_a_longer_log(folder):
    noted = verify(folder).head
    record(folder, "revoke", client="north")
    assert verify(folder, seen=noted).lines == 4


def test_a_crash_between_a_line_and_the_head_is_no_damage(folder):
    head = (folder / HEAD).read_bytes()
    record(folder, "revoke", client="north")
    (folder / HEAD).write_bytes(head)
    assert verify(folder).lines == 4


def test_a_new_key_is_named_by_the_old_one_and_signs_from_then_on(folder):
    old, new = read_key(folder / "key.pem"), new_key()
    for _ in range(2):  # a crash may come between the line and the new key's file
        record_new_key(folder, new.public_key(), why="renew")
    (folder / "key.pem").unlink()
    write_key(folder / "key.pem", new)
    record(folder, "approve", client="east")
    found = verify(folder)
    assert (found.lines, len(found.keys)) == (5, 2)
    (folder / "key.pem").unlink()
    write_key(folder / "key.pem", old)
    record(folder, "approve", client="evil")
    with pytest.raises(LogError, match="line 6: its signature is not valid"):
        verify(folder)


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"[]\n", b"\xff\n", b'{"signature": 1}\n'])
def test_what_is_no_log_is_one_clear_error(tmp_path, text):
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(LogError, match="line 1"):
        verify(tmp_path)
    with pytest.raises(LogError, match="cannot be read"):
        verify(tmp_path / "none")
