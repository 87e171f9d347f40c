"""The file behind the live page: what is going on, from another process, and never in the way."""

import json
import os
import time

import pytest

from silotune.core.errors import QuorumError
from silotune.core.types import Failure
from silotune.federation.live_file import FILE, is_alive, read_live
from silotune.federation.live_writer import LiveFile


def begin(live):
    live.begin(2, 1)
    live.begin_round(1, ["north", "south\x1b[2J"])
    live.client_begins("north")
    live.client_steps("north", 0, 4, 0)
    live.client_steps("north", 1, 4, 100)


def stop(live, error):
    begin(live)
    raise error


def test_the_file_says_who_does_what_and_is_gone_when_the_run_is_done(tmp_path):
    live = LiveFile(tmp_path)
    with live.writing():
        begin(live)
        live.client_failed(Failure("south\x1b[2J", 1, "timeout", "no answer"))
        deadline = time.monotonic() + 20
        while not (found := read_live(tmp_path)) or not found["clients"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert found["state"] == "running"
        assert (found["round"], found["rounds"]) == (1, 2)
        assert found["clients"]["north"]["words"].startswith("step 1/4")
        assert found["clients"]["south\x1b[2J"]["state"] == "failed"
        assert [text for _, text in found["log"]][-1] == "  south: timeout: no answer"
        assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stops_says_why_and_a_bug_only_its_kind(tmp_path):
    for error, why in (
        (QuorumError("round 1: nobody came"), "round 1: nobody came"),
        (ValueError("a row of somebody"), "ValueError"),
    ):
        live = LiveFile(tmp_path)
        with pytest.raises(type(error)), live.writing():
            stop(live, error)
        found = read_live(tmp_path)
        assert found["state"] == "stopped"
        assert found["log"][-1][1] == why


def test_a_process_that_was_killed_is_not_running(tmp_path):
    gone = next(pid for pid in range(2**22 - 1, 0, -1) if not is_alive(pid))
    (tmp_path / FILE).write_text(json.dumps({"state": "running", "pid": gone}))
    assert read_live(tmp_path)["state"] == "stopped"
    (tmp_path / FILE).write_text(json.dumps({"state": "running", "pid": os.getpid()}))
    assert read_live(tmp_path)["state"] == "running"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "running"}', "\xff"])
def test_a_damaged_file_is_as_none(tmp_path, text):
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    assert read_live(tmp_path) is None


def test_a_run_goes_on_where_the_file_cannot_be_written(tmp_path):
    with LiveFile(tmp_path / "gone").writing():
        pass
    (tmp_path / f".{FILE}.part").mkdir()
    with LiveFile(tmp_path).writing():
        pass
