"""What the server's status says about a run that is under way."""

import json
from types import SimpleNamespace

import pytest

from silotune.core.installed import code_sha256, version
from silotune.deployment import status as module
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.join import init
from silotune.deployment.orders import RUNNING
from silotune.deployment.status import status_tables
from silotune.federation.roster import MEMBERS, ORDERS, Roster
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse
from silotune.runtime.flower.server_reports import FileProgress


@pytest.fixture
def run(tmp_path):
    """A run that has been started, and the folder that its server app writes its progress to."""
    made = RunFolder.create(tmp_path / "run", parse({"rounds": 2, "data": {"path": "here"}}))
    orders = {"state": RUNNING, "why": "", "tries": 0, "round": 0}
    (made.path / ORDERS).write_text(json.dumps(orders))
    place = tmp_path / "runs" / made.run_id()
    place.mkdir(parents=True)
    return SimpleNamespace(path=made.path, engine=tmp_path, place=place, id=made.run_id())


def waiting_for(run) -> list[str]:
    return module._run(run.path, run.engine, ["north", "south"])["waiting_for"]


def test_before_the_first_round_a_run_waits_for_the_clients_that_are_away(run):
    """The column was empty until a client came, and nobody knew what the run was doing."""
    assert waiting_for(run) == ["north", "south"]
    progress = FileProgress(run.place)
    progress.note("loading a base")
    assert waiting_for(run) == ["north", "south"]
    progress.begin_round(1, ["north"])
    assert waiting_for(run) == ["north"]
    progress.end_round(1, [])
    assert waiting_for(run) == []
    progress.end()


def test_a_line_that_is_being_written_is_no_error(run):
    progress = FileProgress(run.place)
    progress.begin_round(1, ["north", "south"])
    progress.end()
    with (run.place / "progress.jsonl").open("a") as file:
        file.write('{"event": "client_do')
    assert waiting_for(run) == ["north", "south"]


def test_a_run_is_shown_with_the_id_that_its_clients_know(run):
    own = module._run(run.path, run.engine, [])
    now = {"clients": [], "runs": [own]}
    header, row = status_tables(now)[1]
    assert dict(zip(header, row, strict=True))["id"] == run.id[:8]


def test_a_run_shows_whose_consent_it_waits_for(run):
    progress = FileProgress(run.place)
    progress.waits_for_consent(["north"])
    own = module._run(run.path, run.engine, ["south"])
    assert own["waiting_for_consent"] == ["north"]
    assert module.waiting_words(own) == "south; consent of north"
    progress.begin_round(1, ["north", "south"])
    progress.end_round(1, [])
    now = {"clients": [], "runs": [module._run(run.path, run.engine, [])]}
    header, row = status_tables(now)[1]
    assert dict(zip(header, row, strict=True))["waiting for"] == "consent of north"
    progress.waits_for_consent([])
    assert module._run(run.path, run.engine, [])["waiting_for_consent"] == []
    progress.waits_for_consent(["north"])
    progress.end()
    FileProgress(run.place).end()  # a new server app asks again
    assert module._run(run.path, run.engine, [])["waiting_for_consent"] == []


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({}, ""),
        ({"version": version(), "code_sha256": code_sha256()}, version()),
        ({"version": "0.0.1", "code_sha256": code_sha256()}, "0.0.1, differs from the server's"),
        (
            {"version": version(), "code_sha256": "ab"},
            f"{version()}, differs from the server's",
        ),
    ],
)
def test_a_client_that_runs_another_silotune_is_shown(tmp_path, said, shown):
    Consortium.create(tmp_path / "fl", name="demo", address="127.0.0.1")
    init("north", tmp_path / "north")
    Consortium.open(tmp_path / "fl").approve(tmp_path / "north" / "request.toml")
    roster = Roster(tmp_path / "fl" / MEMBERS)
    if said:
        roster.saw_version("north", **said)
    clients = module.clients_of(tmp_path / "fl")
    assert status_tables({"clients": clients, "runs": []})[0][1] == ("north", "away", shown)
