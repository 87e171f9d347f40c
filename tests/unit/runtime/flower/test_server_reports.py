"""Progress and outcome between two processes: nothing is lost, doubled or reported in full."""

import inspect
import json
import os

import pytest
import torch

from silotune.core import errors
from silotune.core.errors import EngineError, QuorumError, SilotuneError
from silotune.core.types import Failure, Score, Update
from silotune.federation.progress import Progress
from silotune.runtime.flower.server_reports import (
    OUTCOME,
    PROGRESS,
    FileProgress,
    Follower,
    read_outcome,
    write_outcome,
)

METRICS = {"train_loss": 1.5, "num_tokens": 5, "seconds_training": 0.1, "seconds": 0.25}
UPDATE = Update(
    client="Orléans / 2",
    round=2,
    delta={"a": torch.tensor([1.0, 2.0])},
    num_examples=3,
    metrics=METRICS,
    settings={"mu": 0.01},
    extra={"controls": {"a": torch.ones(1)}},
    score=Score("Orléans / 2", 1.0, 2, 1, 1),
    bytes_down=8,
    bytes_up=12,
)
ROWS = [
    {"event": "train", "round": 2, "client": "north", "status": "ok", "num_tokens": 5, "lr": 1e-3},
    {"event": "evaluate", "round": 1, "client": "北京", "status": "timeout", "place": "\u2028\n"},
    {"event": "round", "round": 2, "num_asked": 2, "seconds": 0.1},
]
CALLS = [
    ("begin", (3, 2)),
    ("has_clients", (5,)),
    ("doing", ("loading", 1, 2)),
    ("waits_for_consent", (["north"],)),
    ("note", ("base model:\n 'ü' \u2028 {}",)),
    ("begin_round", (2, ["north", "Orléans / 2"])),
    ("waits_for_consent", (["north"],)),
    ("client_begins", ("north",)),
    ("client_scores", ("north", 0, 9)),
    ("client_steps", ("north", 1, 50, 640)),
    ("client_done", (UPDATE,)),
    ("client_failed", (Failure("south", 2, "timeout", "no answer within 1 s", "wait"),)),
    ("end_round", (2, ROWS)),
    ("begin_scoring", (["north", "south"],)),
    ("client_scored", ("north",)),
]


class Recording(Progress):
    """Every call with its arguments, by the names of `Progress`."""

    def __init__(self):
        self.calls = []


def _record(name):
    def method(self, *args, **kwargs):
        bound = inspect.signature(getattr(Progress, name)).bind(self, *args, **kwargs)
        self.calls.append((name, tuple(bound.arguments.values())[1:]))

    return method


NAMES = [n for n, f in vars(Progress).items() if inspect.isfunction(f)]
for _name in NAMES:
    setattr(Recording, _name, _record(_name))


@pytest.fixture
def written(tmp_path):
    progress = FileProgress(tmp_path)
    yield progress
    progress.end()


def tell(progress, calls=CALLS):
    for name, args in calls:
        getattr(progress, name)(*args)


def plain(calls):
    """Calls as values: an update without its tensors, which stay where they are summed."""
    return [
        (
            name,
            tuple(
                {**vars(a), "delta": {}, "extra": {}, "score": None} if isinstance(a, Update) else a
                for a in args
            ),
        )
        for name, args in calls
    ]


def test_every_event_of_progress_is_in_this_test():
    assert {name for name, _ in CALLS} | {"end"} == set(NAMES)


def test_events_arrive_on_the_other_side_in_order_and_once(tmp_path, written):
    tell(written)
    heard = Recording()
    follower = Follower(tmp_path, heard)
    follower.follow()
    assert plain(heard.calls) == plain(CALLS)
    (update,) = [args[0] for name, args in heard.calls if name == "client_done"]
    assert update.delta == update.extra == {}
    assert update.score is None
    follower.follow()
    assert len(heard.calls) == len(CALLS)
    written.note("more")
    follower.follow()
    assert heard.calls[-1] == ("note", ("more",))
    assert len(heard.calls) == len(CALLS) + 1


def test_each_event_arrives_at_once(tmp_path, written):
    heard = Recording()
    follower = Follower(tmp_path, heard)
    for n, call in enumerate(CALLS, start=1):
        tell(written, [call])
        follower.follow()
        assert len(heard.calls) == n, call[0]


def test_the_process_that_writes_is_known(tmp_path):
    follower = Follower(tmp_path, Recording())
    follower.follow()
    assert follower.process is None, "nothing is there yet"
    progress = FileProgress(tmp_path)
    follower.follow()
    assert follower.process is not None
    assert follower.process[0] == os.getpid()
    assert not follower.has_ended()
    progress.end()


def test_a_line_that_is_being_written_waits(tmp_path):
    heard = Recording()
    follower = Follower(tmp_path, heard)
    line = json.dumps({"event": "note", "text": "whole"}).encode() + b"\n"
    for end in range(len(line)):
        (tmp_path / PROGRESS).write_bytes(line[:end])
        follower.follow()
        assert heard.calls == [], end
    (tmp_path / PROGRESS).write_bytes(line + line[:-1])
    follower.follow()
    assert heard.calls == [("note", ("whole",))]
    (tmp_path / PROGRESS).write_bytes(line * 2)
    follower.follow()
    assert heard.calls == [("note", ("whole",))] * 2


def test_the_lines_are_json_and_hold_no_tensor(tmp_path, written):
    tell(written)
    lines = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines() if line]
    assert [line["event"] for line in lines] == ["started", *(name for name, _ in CALLS)]
    (done,) = [line for line in lines if line["event"] == "client_done"]
    assert done == {
        "event": "client_done",
        "client": "Orléans / 2",
        "round": 2,
        "num_examples": 3,
        "metrics": METRICS,
        "settings": {"mu": 0.01},
        "bytes_down": 8,
        "bytes_up": 12,
    }


def test_a_resumed_server_app_continues_below_the_old_lines(tmp_path):
    for text in ("one", "two"):
        progress = FileProgress(tmp_path)
        progress.note(text)
        progress.end()
    heard = Recording()
    Follower(tmp_path, heard).follow()
    assert heard.calls == [("note", ("one",)), ("note", ("two",))]


def test_half_a_line_of_a_killed_server_app_loses_nothing_of_the_next(tmp_path):
    (tmp_path / PROGRESS).write_text('{"event": "note", "te')
    progress = FileProgress(tmp_path)
    progress.note("two")
    progress.end()
    heard = Recording()
    follower = Follower(tmp_path, heard)
    follower.follow()
    assert follower.process is not None
    assert heard.calls == [("note", ("two",))]


# --- the outcome ---------------------------------------------------------------------------------

FACTS = {"num_rows": {"北京": {"num_train": 3, "num_eval": 1}}, "processes": []}
OURS = [
    cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, SilotuneError)
]


def test_without_an_outcome_the_app_still_runs(tmp_path):
    assert read_outcome(tmp_path) is None


def test_a_good_end_gives_the_facts(tmp_path):
    write_outcome(tmp_path, FACTS, None)
    assert read_outcome(tmp_path) == {**FACTS, "error": None}


@pytest.mark.parametrize("cls", OURS)
def test_our_own_error_is_raised_again_with_class_and_text(tmp_path, cls):
    text = "round 1: 1 usable updates of 4.\n  south: timeout: 'ü'"
    write_outcome(tmp_path, FACTS, cls(text))
    with pytest.raises(SilotuneError) as caught:
        read_outcome(tmp_path)
    assert type(caught.value) is cls
    assert str(caught.value) == text
    assert caught.value.exit_code == cls.exit_code


class Own(QuorumError):
    """A class that errors.py does not have."""


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        (KeyError("patient 4711"), "KeyError"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (KeyboardInterrupt("patient 4711"), "KeyboardInterrupt"),
        (SystemExit("patient 4711"), "SystemExit"),
        # errors.py has a class of that name, but it is not one of our errors
        (type("Exception", (ValueError,), {})("patient 4711"), "Exception"),
        (type("__doc__", (ValueError,), {})("patient 4711"), "__doc__"),
    ],
)
def test_a_bug_becomes_an_engine_error_without_its_text(tmp_path, bug, kind):
    write_outcome(tmp_path, FACTS, bug)
    assert "4711" not in (tmp_path / OUTCOME).read_text()
    with pytest.raises(EngineError) as caught:
        read_outcome(tmp_path)
    assert str(caught.value) == f"the server app ended with {kind}."


def test_an_error_of_a_class_that_is_not_known_here_is_still_an_error(tmp_path):
    write_outcome(tmp_path, FACTS, Own("too few"))
    with pytest.raises(EngineError, match=r"the server app ended with Own\."):
        read_outcome(tmp_path)


def test_an_outcome_is_there_completely_or_not_at_all(tmp_path):
    (tmp_path / (OUTCOME + ".part")).write_text('{"error": nu')
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, FACTS, None)
    assert not (tmp_path / (OUTCOME + ".part")).exists()
