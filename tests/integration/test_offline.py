"""Without a network: fresh processes, an empty cache, and a hub whose port is closed.

HF_HUB_OFFLINE is not set: whoever has no network has not said so either.
"""

import json
import os
import subprocess
import sys
import time

import pytest

import silotune
from silotune.recipes.parse import load_recipe

TRACKERS_MIB = {
    # recipe: what FlowerTune's tracker counted, or what follows from the papers
    "medical-dora": "3158.91",
    "flowertune": "16255.08",
    "blueprint": "16255.08",
    "flowertune-general": "41612.50",
    "flowertune-medical": "41612.50",
    "flowertune-code": "41612.50",
    "flowertune-finance": "104031.25",
    "hospitals": "55.39",
}
ON_THE_HUB = [n for n in silotune.shipped_recipes() if "/" in load_recipe(n).data.path]


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "PROXY" not in k.upper()}
    places = {"HF_HOME": tmp_path / "hub", "SILOTUNE_CACHE": tmp_path / "models"}
    return ours | {k: str(v) for k, v in places.items()} | {"HF_ENDPOINT": "http://127.0.0.1:1"}


def start(env, cwd, *words):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=280
    )
    return done, time.monotonic() - began


PROGRAM = """
import json, sys
import silotune
found = {}
for name in silotune.shipped_recipes():
    checked = silotune.check(name, offline=True)
    made = silotune.plan(name, measured=False)
    found[name] = {
        "unchecked": list(checked.unchecked),
        "rows": len(checked.rows),
        "mib": f"{made.traffic.tracker_mib:.2f}",
        "peak": made.peak_bytes,
        "notes": list(made.notes),
    }
json.dump(found, sys.stdout)
"""


@pytest.mark.slow  # half a minute; the tests below check single ones
def test_every_shipped_recipe_is_checked_and_planned(offline, tmp_path):
    done, _ = start(offline, tmp_path, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(silotune.shipped_recipes())
    assert {name: found[name]["mib"] for name in TRACKERS_MIB} == TRACKERS_MIB
    for name, own in found.items():
        assert own["peak"] > 1e9, name
        on_hub = name in ON_THE_HUB
        assert any(text.startswith("the rows: ") for text in own["unchecked"]) == on_hub, name
        assert (own["rows"] == 0) == on_hub
        assert any("its shape is from" in text for text in own["notes"]) == (name != "hospitals")
    assert not (tmp_path / "models").exists(), "a plan fetches no weights"


def test_the_command_says_once_what_it_did_not_check(offline, tmp_path):
    done, _ = start(offline, tmp_path, "-m", "silotune", "check", "blueprint")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "not checked",
        "not checked",
        "no mistakes found in everything else",
        "not looked at",
    ]
    assert "'vicgalle/alpaca-gpt4' is no local file or folder, and the hub cannot" in lines[0]
    assert "privacy guarantee" in lines[1]


def test_a_mistake_is_found_all_the_same(offline, tmp_path):
    words = ("-m", "silotune", "check", "medical-dora", "train.lr=-1")
    done, _ = start(offline, tmp_path, *words)
    assert done.returncode == 2
    assert "train.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_needs_the_rows_is_one_error(offline, tmp_path):
    done, _ = start(offline, tmp_path, "-m", "silotune", "run", "workshop")
    assert done.returncode == 2
    # on a slow machine, lines about progress stand before it
    assert "\nHubUnreachable: 'NIH-CARD/CARDBiomedBench' is no local file" in f"\n{done.stderr}"
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_name_that_cannot_be_told_from_a_misspelt_file_stays_an_error(offline, tmp_path):
    done, _ = start(offline, tmp_path, "-m", "silotune", "check", "workshop", "data.path=my_rows")
    assert done.returncode == 2
    assert "neither a named example nor a local file or folder" in done.stderr
    assert "Retrying" not in done.stderr
