"""What operators did is in a log that shows changes, by the documented commands."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.deployment.audit_log import check_log
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.join import take_kit
from silotune.deployment.queue import submit
from silotune.deployment.status import status
from silotune.deployment.supervisor import only_one
from silotune.federation.operator_log import FILE, LogError, entries


def typed(*words, fails: bool = False):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert (done.exit_code != 0) == fails, done.output
    return done


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed("server", "init", "demo", "--address", "127.0.0.1")
    for name in ("north", "south"):
        typed("client", "init", name)
        typed("server", "approve", f"{name}/request.toml")
    return tmp_path


def test_everything_that_operators_do_is_in_the_log_with_names_and_fingerprints(place):
    folder = place / "consortium"
    typed("server", "revoke", "south")
    typed("server", "approve", "south/request.toml", fails=True)
    typed("server", "approve", "south/request.toml", "--again")
    run = submit(folder, "hospitals", clients=["north"])
    typed("server", "stop", run.name)
    typed("server", "submit", "--again", run.name)
    rows = entries(folder)
    done = [(row["what"], row.get("client") or row.get("run")) for row in rows]
    assert done == [
        ("init", None),
        ("approve", "north"),
        ("approve", "south"),
        ("revoke", "south"),
        ("approve refused", "south"),
        ("approve", "south"),
        ("submit", run.name),
        ("stop", run.name),
        ("submit again", run.name),
    ]
    assert rows[5]["again"] is True
    assert rows[6]["clients"] == ["north"]
    assert len(rows[6]["recipe_sha256"]) == 64
    assert rows[2]["fingerprint"] == entries(place / "south")[0]["fingerprint"]


def test_verify_shows_whose_key_signed_and_the_hash_to_note(place):
    said = typed("audit-log", "verify", "consortium").stdout
    assert said.startswith("3 lines, 2")
    assert f"signed by {Consortium.open(place / 'consortium').fingerprint()}" in said
    noted = said.split()[-1]
    typed("server", "revoke", "north")
    typed("audit-log", "verify", f"consortium/{FILE}", "--seen", noted)
    assert typed("audit-log", "verify", "north").stdout.startswith("1 line, 2")


def test_a_log_alone_says_that_its_key_has_to_be_compared(place):
    shutil.copy(place / "consortium" / FILE, place / "sent.jsonl")
    said = typed("audit-log", "verify", "sent.jsonl").stdout
    assert "compare the last one with the fingerprint" in said
    assert check_log(place / "sent.jsonl").is_own is False


def test_damage_is_an_error_that_names_the_line(place):
    path = place / "consortium" / FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1]]))
    done = typed("audit-log", "verify", "consortium", fails=True)
    assert "line 2: it is not the one that follows the line before it" in done.stderr
    path.write_text("".join(lines[:2]))
    done = typed("audit-log", "verify", "consortium", fails=True)
    assert "has 2 lines" in done.stderr
    assert "knows of line 3" in done.stderr


def test_a_log_that_was_written_again_with_another_key_is_found(place):
    """Somebody without the key can make a whole new log, but not with the key that people know."""
    typed("server", "init", "demo", "--address", "127.0.0.1", "--folder", "other")
    for name in (FILE, "operators.head"):
        shutil.copy(place / "other" / name, place / "consortium" / name)
    with pytest.raises(LogError, match="but the folder's own is"):
        check_log(place / "consortium")


def test_the_log_holds_no_secret(place):
    for folder in (place / "consortium", place / "north"):
        text = (folder / FILE).read_text()
        assert "PRIVATE" not in text
        assert str(place) not in text
        assert all(json.loads(line)["user"] for line in text.splitlines())


def test_a_restored_consortium_has_its_members_and_runs_and_shows_what_is_missing(place):
    """As docs/how-to/maintain.md restores it: from a copy, at the same path."""
    folder = place / "consortium"
    run = submit(folder, "hospitals")
    shutil.copytree(folder, place / "backup")
    before = check_log(folder)
    typed("server", "revoke", "north")
    after = check_log(folder)
    shutil.rmtree(folder)
    shutil.copytree(place / "backup", folder)
    assert list(Consortium.open(folder).members()) == ["north", "south"], "the backup is older"
    assert [own["name"] for own in status(folder)["runs"]] == [run.name]
    assert check_log(folder) == before
    with pytest.raises(LogError, match="does not hold the line"):
        check_log(folder, seen=after.head)
    typed("server", "revoke", "north")
    typed("client", "init", "west")
    typed("server", "approve", "west/request.toml")
    assert check_log(folder, seen=before.head).lines == before.lines + 2


def test_a_server_that_is_up_keeps_its_key(place):
    engine = place / "consortium" / "engine"
    with only_one(engine / "up.lock", what="x"):
        done = typed("server", "renew", fails=True)
    assert "the server is up and uses its present key" in done.stderr
    assert typed("server", "renew").stdout.startswith("the server's new key: ")


def test_a_clients_key_is_renewed_by_the_documented_commands(place):
    (place / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    kit = place / "consortium" / "kits" / "north.toml"
    take_kit(kit, place / "north", data=place / "rows.jsonl")
    shown = typed("client", "renew", "north").stdout.splitlines()[0]
    assert typed("server", "approve", "north/request.toml").stdout.splitlines()[0] == shown
    take_kit(kit, place / "north")
    said = typed("audit-log", "verify", "north").stdout
    assert said.count("signed by") == 2
    assert shown.rpartition(": ")[2] in said
