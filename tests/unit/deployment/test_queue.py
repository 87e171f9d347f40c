"""A submitted recipe means the same in the folder where the engine runs."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.notice import write_notice
from silotune.deployment.orders import find_run
from silotune.deployment.queue import chosen_clients, for_real_clients, recipe_sha256
from silotune.deployment.status import runs_now
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse
from tests.conftest import write_jsonl


def test_the_servers_own_files_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = write_jsonl(tmp_path / "own.jsonl", [{"question": "q", "answer": "a"}])
    run = parse(
        {
            "rounds": 1,
            "data": {"path": "rows.jsonl"},
            "server": {"data_path": "train.jsonl", "work": "fine-tune"},
            "evaluate": {"server_path": "own.jsonl"},
        }
    )
    sent = for_real_clients(run, tmp_path / "consortium")
    assert sent.evaluate.server_path == str(own)
    assert sent.server.data_path == "train.jsonl", "it may be a name; a missing file is told later"


def test_a_run_that_is_submitted_to_a_server_that_is_not_up_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "consortium"
    Consortium.create(folder, name="demo", address="127.0.0.1:8443")
    words = ["--folder", str(folder)]
    for typed in (["client", "init", "north"], ["server", "approve", "north/request.toml", *words]):
        assert CliRunner().invoke(app, typed).exit_code == 0
    done = CliRunner().invoke(app, ["server", "submit", "hospitals", *words])
    assert done.exit_code == 0, done.output
    assert "the server is not up; the run waits for: silotune server up" in done.stderr
    (run,) = (folder / "runs").iterdir()
    done = CliRunner().invoke(app, ["server", "log", *words])
    assert done.stdout == ""
    assert done.stderr == f"{run.name} has printed nothing yet\n"


@pytest.fixture
def three(tmp_path, monkeypatch):
    """A consortium of three, typed in its folder."""
    monkeypatch.chdir(tmp_path)
    Consortium.create(tmp_path / "consortium", name="demo", address="127.0.0.1:8443")
    for name in ("north", "south", "west"):
        typed("client", "init", name)
        typed("server", "approve", f"{name}/request.toml")
    return tmp_path / "consortium"


def typed(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done


def test_a_run_for_some_clients_has_no_others_and_is_not_announced_to_them(three, tmp_path):
    typed("server", "submit", "hospitals", "--clients", "south, north,south")
    (run,) = (three / "runs").iterdir()
    assert chosen_clients(run) == ["north", "south"]
    (now,) = runs_now(three, ["north", "west"])
    assert now["state"] == "waiting"
    write_notice(tmp_path / "public", three)
    (notice,) = (tmp_path / "public").rglob("*.json")
    assert json.loads(notice.read_text())["recipe"] is None
    assert "north" not in (run / "recipe.toml").read_text(), "the recipe travels to all of them"
    typed("server", "submit", "hospitals")
    write_notice(tmp_path / "public", three)
    assert json.loads(notice.read_text())["recipe"] is not None


def test_a_run_for_somebody_unknown_is_refused_with_the_members(three):
    done = CliRunner().invoke(app, ["server", "submit", "hospitals", "--clients", "north,norht"])
    assert done.exit_code == 2
    assert "'norht': not in this consortium." in done.stderr
    assert "Its members: north, south, west." in done.stderr
    assert list((three / "runs").iterdir()) == []


def test_the_hash_of_a_submitted_recipe_is_said(three):
    said = typed("server", "submit", "hospitals")
    again = typed("server", "submit", "hospitals", "runtime.threads=1")
    other = typed("server", "submit", "hospitals", "rounds=1")
    last = [done.stderr.splitlines()[0] for done in (said, again, other)]
    assert last[0].startswith("clients know the recipe by its SHA-256: ")
    assert last[0] == last[1] != last[2]


def test_a_copy_of_a_consortium_runs_on_its_own(three, tmp_path):
    """A restored backup handed its stopped runs to the folder that they had been submitted in."""
    typed("server", "submit", "hospitals")
    here = find_run(three, None)
    before = recipe_sha256(here)
    other = tmp_path / "restored" / "consortium"
    shutil.copytree(three, other)
    for _ in range(2):  # with the first folder beside it, and after it is gone
        there = find_run(other, here.name)
        assert RunFolder.open(there).run.data.path == str(other)
        assert recipe_sha256(there) == before, "clients have agreed to this one"
        shutil.rmtree(three, ignore_errors=True)
