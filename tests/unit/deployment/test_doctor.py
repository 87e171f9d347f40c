"""What the doctor says about secure sums: this client's fingerprint, and who is on its roster."""

from silotune.deployment import doctor
from silotune.deployment.consortium.kit import read_kit
from silotune.deployment.join import Joined
from silotune.federation.client_config import ClientConfig
from silotune.recipes.parse import parse
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
