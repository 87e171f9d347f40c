"""What a client sees of itself, from the files in its folder and without torch."""

import json
import os
import subprocess
import sys
import time

import pytest

from silotune.core.errors import ConfigError
from silotune.deployment.client_status import (
    Activity,
    client_status,
    forget_connection_state,
    status_lines,
    status_table,
    write_connection_state,
)
from silotune.federation.live_file import FILE
from silotune.federation.outbound_log import FILE as OUTBOUND
from tests.consortium import Kits

RUN = "0123456789abcdef"


def answer(asked, said, *, size=1000, seconds=60.0, run=RUN):
    at = "2026-01-31T12:00:00+00:00"
    facts = {"time": at, "run": run, "asked": asked, "bytes": size, "seconds": seconds}
    return json.dumps({**facts, "said": said}) + "\n"


UPDATE = {"update": {"round": 2}, "client": "north"}


@pytest.fixture
def client(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "client.toml").write_text(
        'name = "north"\nstate = "state"\n[limits]\nmax_bytes = 5000\nmax_hours = 1\n'
    )
    return tmp_path


def write_live(client, **changes):
    own = {"state": "training", "words": "step 3/10, 120 tokens/s"}
    facts = {
        "state": "running",
        "pid": os.getpid(),
        "run": RUN,
        "round": 2,
        "rounds": 20,
        "headline": "round 2/20",
        "clients": {"north": own},
        "log": [],
    }
    (client / "state" / FILE).write_text(json.dumps({**facts, **changes}))


def test_a_client_that_has_not_joined_says_so(client):
    found = client_status(client)
    assert status_lines(found)[0] == "north: not joined; `silotune client join` is not running"
    assert status_lines(found)[1] == "last answer: none so far"
    assert found["now"] is found["last"] is found["epsilon"] is None


def test_connection_round_last_answer_and_what_is_left(client):
    write_connection_state(client / "state", "hospitals", connected=True)
    write_live(client)
    with (client / "state" / OUTBOUND).open("w") as file:
        file.write(json.dumps({"recipe_sha256": "x", "text": "a recipe"}) + "\n")
        file.write(answer("query", {"report": {}}, seconds=5))
        file.write(answer("train", UPDATE, size=3000, seconds=600))
    found = client_status(client)
    first, now, last = status_lines(found)
    assert first.startswith("north: connected to hospitals for ")
    assert now == "now: run 01234567: round 2 of 20, step 3/10, 120 tokens/s"
    assert last.startswith("last answer: round 2: update, 3.0 kB, ")
    header, row = status_table(found)
    assert header == ("run", "answers", "sent", "sending left", "trained", "training left")
    assert row == ("01234567", "2", "4.0 kB", "1.0 kB", "10 min 00 s", "50 min 00 s")
    write_connection_state(client / "state", "hospitals", connected=False)
    assert "not connected to hospitals" in status_lines(client_status(client))[0]
    forget_connection_state(client / "state")
    assert not client_status(client)["joined"]


def test_a_folder_of_no_client_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"has no client\.toml.*\n  Give the folder"):
        client_status(tmp_path)


def test_join_reports_answers_at_once_and_steps_from_time_to_time(client, monkeypatch):
    path = client / "state" / OUTBOUND
    path.write_text(answer("train", UPDATE))
    activity = Activity(client, client / "state")
    assert list(activity.news()) == []  # it was sent before
    write_live(client)
    assert list(activity.news()) == ["run 01234567: round 2 of 20, step 3/10, 120 tokens/s"]
    own = {"state": "training", "words": "step 4/10, 120 tokens/s"}
    write_live(client, clients={"north": own})
    assert list(activity.news()) == []  # so soon
    whole = answer("train", UPDATE, size=21_500)
    with path.open("a") as file:
        file.write(whole[:20])
        file.flush()
        assert list(activity.news()) == []  # a line that is being written
        file.write(whole[20:])
    assert list(activity.news()) == ["run 01234567: sent round 2: update, 21.5 kB"]
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert list(activity.news()) == ["run 01234567: round 2 of 20, step 4/10, 120 tokens/s"]


def test_status_imports_neither_torch_nor_pydantic(client):
    code = (
        "import sys\nfrom silotune.cli import app\n"
        f"try:\n    app(['client', 'status', {str(client)!r}])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'pydantic', 'flwr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_fingerprint_is_that_of_the_clients_own_key(client):
    assert client_status(client)["fingerprint"] == "", "before there is a kit"
    kits = Kits({"north": client})
    found = client_status(client)
    assert found["fingerprint"] == kits.roster["north"]
    assert f"fingerprint: {kits.roster['north']}" in status_lines(found)
    (client / "kit.toml").write_text("certificate = 1")
    assert client_status(client)["fingerprint"] == ""
