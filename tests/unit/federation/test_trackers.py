"""Rounds become curves in a tracker: TensorBoard for real, the others if they are missing."""

import pytest
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from silotune.core.errors import ConfigError
from silotune.federation.trackers import Tracker, check_tracker

TRAINED = {"event": "train", "round": 1, "status": "ok", "bytes_up": 10, "bytes_down": 20}
ROWS = [
    {**TRAINED, "client": "north", "train_loss": 2.0, "num_tokens": 10},
    {**TRAINED, "client": "south", "train_loss": 3.0, "num_tokens": 30},
    {"event": "train", "round": 1, "client": "west", "status": "late", "place": ""},
    {"event": "evaluate", "round": 0, "client": "north", "status": "ok", "loss": 2.5,
     "num_tokens": 10},
    {"event": "evaluate", "round": 0, "client": "south", "status": "ok", "loss": 3.5,
     "num_tokens": 10, "bytes_down": 5},
    {"event": "round", "round": 1, "num_asked": 3, "seconds": 4.5},
]  # fmt: skip
WRITTEN = {
    ("train_loss/north", 1): 2.0,
    ("train_loss/south", 1): 3.0,
    ("train_loss/all", 1): 2.75,  # weighted by tokens
    ("held_out_loss/north", 0): 2.5,
    ("held_out_loss/south", 0): 3.5,
    ("held_out_loss/all", 0): 3.0,
    ("bytes_up", 1): 20.0,
    ("bytes_down", 1): 45.0,
    ("seconds", 1): 4.5,
}


def test_validation_rows_and_the_servers_test_set_have_curves_of_their_own():
    logged = {}
    tracker = object.__new__(Tracker)
    tracker._tracker = type(
        "Stub",
        (),
        {
            "log": lambda self, values, step: logged.update(
                {(k, step): v for k, v in values.items()}
            )
        },
    )()
    validation = [{**row, "part": "validation"} for row in ROWS if row["event"] == "evaluate"]
    server = {"event": "server-test", "round": 1, "status": "ok", "loss": 1.5, "num_tokens": 9}
    tracker.log_scores([*validation, server])
    assert logged[("validation_loss/all", 0)] == 3.0
    assert logged[("loss/server's test set", 1)] == 1.5
    assert not any(key.startswith("held_out") for key, _ in logged)


def test_tensorboard_holds_the_numbers_of_a_round(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker("tensorboard", folder=tmp_path, settings={"seed": 3, "data.path": None})
    tracker.end_round(1, ROWS)
    tracker.end()
    events = EventAccumulator(str(tmp_path / "tracker"))
    events.Reload()
    found = {
        (tag, event.step): pytest.approx(event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    assert found == WRITTEN


def test_no_tracker_needs_no_library():
    check_tracker("none")


def test_a_tracker_with_a_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report.tracker = 'wandb'[\s\S]*pip install wandb"):
        check_tracker("wandb")


class WritesToItsLog:
    """Starts like accelerate's classes for wandb and trackio."""

    def __init__(self, **_) -> None: ...

    def start(self) -> None:
        get_logger("accelerate.tracking").debug("opened")

    def store_init_configuration(self, values) -> None: ...


def test_a_tracker_can_write_to_the_log_of_accelerate(tmp_path, monkeypatch):
    # Bug: wandb and trackio raised "You must initialize the accelerate state".
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", WritesToItsLog)
    PartialState._reset_state()
    Tracker("wandb", folder=tmp_path, settings={})
