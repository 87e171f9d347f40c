"""The record of what has left a client is complete and written first, and its limit holds."""

import hashlib
import json

import numpy as np
import pytest
import torch

from silotune.core.errors import Declined, DiskError
from silotune.core.types import Update
from silotune.federation.ledger import lines
from silotune.federation.outbound_log import (
    LONGEST_REFUSED,
    MOST_REFUSED,
    Outbound,
    answer_words,
    sent_by_run,
)
from silotune.runtime import wire
from silotune.runtime.payload import Parcel, no_values
from tests.conftest import largest_file


def update(value: float = 1.0, size: int = 3, round_: int = 1) -> Parcel:
    delta = {"a": torch.full((size,), value), "b": torch.zeros(2, 2)}
    metrics = {"seconds": 1.0, "seconds_training": 0.5}
    return wire.encode_update(Update("north", round_, delta, 7, metrics))


def let_out(outbound: Outbound, parcel: Parcel, asked: str = "train", seconds: float = 2.0) -> None:
    outbound.let_out(parcel.about, parcel.values, asked=asked, seconds=seconds)


def test_a_line_records_everything_that_left_except_the_numbers_themselves(tmp_path):
    path, parcel = tmp_path / "state" / "outbound.jsonl", update(2.0)
    let_out(Outbound(path, "r1"), parcel)
    layout, line = lines(path)
    assert layout["shapes"] == {"delta/a": [3], "delta/b": [2, 2]}
    assert line["tensors"] == layout["layout"]
    assert line["norm"] == pytest.approx(12**0.5)
    assert line["bytes"] == 4 * 7 + len(json.dumps(parcel.about))
    assert line["sha256"] == hashlib.sha256(parcel.values.tobytes()).hexdigest()
    sent = dict(parcel.about["update"])
    sent.pop("tensors")
    assert line["said"] == {"update": sent}
    assert (line["run"], line["asked"], line["seconds"]) == ("r1", "train", 2.0)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("", "round 1: update"),
        ("{}", "round 1: update"),
        ('{"wire": {"up": "float32"}, "secure_sum": {"kind": "none"}}', "round 1: update"),
        ('{"wire": {"up": "int4"}}', "round 1: update as int4"),
        ('{"wire": {"up": "float32"}, "secure_sum": {"kind": "masks"}}', "round 1: update, masked"),
    ],
)
def test_a_line_says_how_the_change_was_written(tmp_path, recipe, words):
    path, parcel = tmp_path / "outbound.jsonl", update()
    outbound = Outbound(path, "r1")
    outbound.let_out(parcel.about, parcel.values, asked="train", seconds=1.0, recipe=recipe)
    assert answer_words(outbound.sent()[-1]) == words


def test_names_and_shapes_are_written_once_and_again_when_they_differ(tmp_path):
    path = tmp_path / "outbound.jsonl"
    for parcel in (update(), update(3.0), update(size=5), update()):
        let_out(Outbound(path, "r1"), parcel)
    found = lines(path)
    assert sum("layout" in line for line in found) == 2
    names = [line["tensors"] for line in found if "tensors" in line]
    assert names[0] == names[1] == names[3] != names[2]


def test_what_exceeds_the_limit_is_neither_written_nor_sent_but_a_failure_is(tmp_path):
    path = tmp_path / "outbound.jsonl"
    let_out(Outbound(path, "r1"), update())
    (size,) = [line["bytes"] for line in lines(path) if "bytes" in line]
    let_out(Outbound(path, "r1", max_bytes=2 * size), update())
    before = path.read_bytes()
    with pytest.raises(
        Declined, match=rf"limits\.max_bytes .* has sent {2 * size} bytes in this run"
    ):
        let_out(Outbound(path, "r1", max_bytes=2 * size), update())
    assert path.read_bytes() == before
    let_out(Outbound(path, "r2", max_bytes=size), update())  # another run has its own
    let_out(Outbound(path, "r1", max_bytes=1), Parcel({"failure": {"code": "x"}}, no_values()))
    assert lines(path)[-1]["said"] == {"failure": {"code": "x"}}


def test_what_cannot_be_recorded_does_not_leave(tmp_path):
    path = tmp_path / "outbound.jsonl"
    with largest_file(100), pytest.raises(DiskError):
        let_out(Outbound(path, "r1"), update())


def test_training_time_is_counted_per_run_including_failed_rounds(tmp_path):
    path = tmp_path / "outbound.jsonl"
    one, other = Outbound(path, "r1"), Outbound(path, "r2")
    let_out(one, update(), seconds=1.5)
    let_out(one, Parcel({"failure": {}}, no_values()), seconds=2.0)
    let_out(one, Parcel({"report": {}}, no_values()), asked="query", seconds=64.0)
    let_out(other, update(), seconds=4.0)
    assert one.seconds_training() == 3.5
    assert other.seconds_training() == 4.0
    first, second = sent_by_run(path)
    assert (first["run"], first["answers"], first["updates"]) == ("r1", 3, 1)
    assert (second["run"], second["answers"], second["updates"]) == ("r2", 1, 1)
    assert first["bytes"] + second["bytes"] == sum(line.get("bytes", 0) for line in lines(path))


def test_the_bytes_of_updates_are_those_that_the_server_counts(tmp_path):
    """The list had only bytes with texts, which no number of the server equals."""
    path, parcel = tmp_path / "outbound.jsonl", update()
    let_out(Outbound(path, "r1"), Parcel({"report": {}}, no_values()), asked="query")
    let_out(Outbound(path, "r1"), parcel)
    counted = parcel.values.nbytes  # bytes_up in metrics.jsonl
    assert [own["bytes_of_updates"] for own in sent_by_run(path)] == [counted]
    assert sent_by_run(path)[0]["bytes"] > counted
    older = [{k: v for k, v in line.items() if k != "bytes_numbers"} for line in lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in older))
    assert [own["bytes_of_updates"] for own in sent_by_run(path)] == [None]


def test_a_large_value_has_a_finite_norm(tmp_path):
    """In float32, its square would be infinite."""
    path = tmp_path / "outbound.jsonl"
    let_out(Outbound(path, "r1"), update(1e30))
    assert np.isfinite(lines(path)[-1]["norm"])


def test_of_recipes_that_were_refused_only_some_are_kept(tmp_path):
    """A server that sends ever new ones fills no disk; what is refused is listed all the same."""
    outbound = Outbound(tmp_path / "outbound.jsonl", "r1")
    refused = {"failure": {"round": 0, "code": "declined", "place": "why", "fix": ""}}

    def send(recipe: str, about=refused) -> None:
        outbound.let_out(about, no_values(), asked="query", seconds=0.1, recipe=recipe)

    send("x" * (LONGEST_REFUSED + 1))
    for number in range(MOST_REFUSED + 5):
        send(f"recipe {number}")
    found = lines(outbound.path)
    assert sum("text" in line for line in found) == MOST_REFUSED
    assert len([line["recipe"] for line in found if "run" in line]) == MOST_REFUSED + 6
    last = f"recipe {MOST_REFUSED + 4}"
    send(last, {"report": {}})  # it is accepted later
    (line,) = [line for line in lines(outbound.path) if line.get("text") == last]
    assert line["recipe_sha256"] == hashlib.sha256(last.encode()).hexdigest()
