"""What the doctor says without a server: programs, versions, and who is on a roster."""

import importlib.metadata

import pytest

from silotune.deployment import doctor
from silotune.deployment.consortium.kit import read_kit
from silotune.deployment.join import Joined
from silotune.deployment.notice import VERSION, Notice
from silotune.federation.client_config import ClientConfig
from silotune.recipes.parse import parse
from silotune.runtime.flower.bundle import READ
from tests.consortium import Kits

RECIPE = {
    "rounds": 1,
    "data": {"path": "medquad_mini"},
    "evaluate": {"every": 0},
    "runtime": {"name": "flower"},
    "secure_sum": {"kind": "masks", "range": 1.0},
}


def sums_of(place, **own):
    """The doctor's line about the sums of client 'north', and its line about the kit."""
    names = ("north", "south", "east", "west")
    kits = Kits({name: place / name for name in names})
    table = {
        "name": "north",
        "data": {"path": "x"},
        "secure_sum": {key: value(kits) for key, value in own.items()},
    }
    folder = place / "north"
    joined = Joined(folder, read_kit(folder / "kit.toml"), ClientConfig.model_validate(table))
    run = parse(RECIPE)
    (found,) = doctor._guarded("sums", lambda: doctor._sums(joined, run))
    return found, doctor._certificate(joined), kits


def test_a_complete_roster_is_ok_and_the_kit_line_has_the_fingerprint_for_the_others(tmp_path):
    found, kit, kits = sums_of(tmp_path, roster=lambda kits: kits.others("north"))
    assert (found.verdict, found.fix) == ("ok", "")
    assert (
        found.text
        == "knows 3 other clients by fingerprint; takes part in sums over at least 4 clients"
    )
    assert f"matches this client's key, {kits.roster['north']}; valid until" in kit.text


def test_a_short_or_missing_roster_fails_with_what_to_do(tmp_path):
    found, _, _ = sums_of(tmp_path / "a", roster=lambda kits: kits.others("north", ["south"]))
    assert found.verdict == "FAIL"
    assert "[secure_sum] roster" in found.fix
    found, _, kits = sums_of(tmp_path / "b")
    assert found.verdict == "FAIL"
    assert found.text == "client 'north' does not take part:"
    assert "roster in its client.toml is empty" in found.fix
    assert kits.roster["north"] in found.fix


@pytest.mark.parametrize(
    ("flower", "verdict"),
    [
        ("1.41.0", "ok"),
        ("1.42.3", "ok"),
        ("1.43.0", "FAIL"),
        ("1.4.1", "FAIL"),
        ("1.420.0", "FAIL"),
    ],
)
def test_a_flower_that_was_not_read_fails_and_the_fix_names_those_that_were(
    monkeypatch, flower, verdict
):
    monkeypatch.setattr(doctor, "find_caddy", lambda: "caddy")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flwr": flower}[name])
    found = doctor._programs()
    assert found.verdict == verdict
    assert f"Flower {flower}" in found.text
    if verdict == "FAIL":
        assert "`join` does not start" in found.text
        assert "Install Flower 1.41.x or 1.42.x" in found.fix


def test_the_installed_flower_is_one_that_was_read():
    assert importlib.metadata.version("flwr").startswith(READ)


@pytest.mark.parametrize(
    ("versions", "server", "verdict"),
    [
        (None, VERSION, "ok"),
        (None, "0.0.7", "FAIL"),
        ([VERSION], VERSION, "ok"),
        (["0.0.7"], VERSION, "FAIL"),
    ],
)
def test_a_server_whose_version_this_client_does_not_accept_fails_before_any_run(
    tmp_path, versions, server, verdict
):
    limits = {} if versions is None else {"versions": versions}
    own = ClientConfig.model_validate({"name": "north", "data": {"path": "x"}, "limits": limits})
    kit = read_kit(Kits({"north": tmp_path}).places["north"] / "kit.toml")
    notice = Notice(version=server, recipe=None, base_sha256=None, server_time=0.0)
    found = doctor._versions(Joined(tmp_path, kit, own), notice)
    assert found.verdict == verdict
    if versions == ["0.0.7"]:
        assert found.text == f"the server's silotune, '{VERSION}', is not in limits.versions"
        assert "limits.versions in client.toml" in found.fix
