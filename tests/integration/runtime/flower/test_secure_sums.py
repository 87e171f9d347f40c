"""Secure sums over Flower's two engines give the bits of one process. Real processes."""

import json
import stat
from pathlib import Path

import pytest

import silotune
from silotune.core.processors import usable_threads
from silotune.runtime.identity import THROWAWAY
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

pytestmark = [pytest.mark.timeout(600), pytest.mark.engine]

ADAPTER = Path("adapter") / "adapter_model.safetensors"
SUMS = [
    *("rounds=2", "data.max_rows=4", "secure_sum.kind=masks", "secure_sum.range=0.25"),
    *("evaluate.every=0", "secure_sum.min_cohort=3"),
]
TOLD = {
    *("event", "round", "client", "status", "num_examples", "bytes_down", "bytes_up"),
    *("lr", "num_steps"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    """Four clients, the fewest of which one may drop out."""
    place = tmp_path_factory.mktemp("sums")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(4, 6))
    return path


@pytest.fixture(scope="module")
def here(recipe, tmp_path_factory):
    """The same numbers without masks and messages."""
    keys = [*SUMS, "secure_sum.simulate=true"]
    return silotune.run(recipe, keys, out=tmp_path_factory.mktemp("here") / "run")


def test_flowers_simulation_opens_the_sums_of_one_process(recipe, here, tmp_path):
    keys = [*SUMS, "runtime.name=flower-simulation", f"runtime.client_cpus={usable_threads()}"]
    there = silotune.run(recipe, keys, out=tmp_path / "run")
    assert (there.path / ADAPTER).read_bytes() == (here.path / ADAPTER).read_bytes()
    path = there.path / THROWAWAY
    assert len(json.loads(path.read_text())) == 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = list((there.path / "clients").glob("*/secure-sum.json"))
    assert len(kept) == 4
    assert [json.loads(p.read_text()) for p in kept] == [{"opened": 2, "rounds": {}}] * 4


def test_real_clients_open_the_sums_of_one_process_and_send_no_number_about_themselves(
    recipe, tmp_path
):
    """One round: every message starts a process."""
    keys = [*SUMS, "rounds=1"]
    here = silotune.run(recipe, [*keys, "secure_sum.simulate=true"], out=tmp_path / "here")
    there = silotune.run(recipe, [*keys, "runtime.name=flower"], out=tmp_path / "run")
    assert (there.path / ADAPTER).read_bytes() == (here.path / ADAPTER).read_bytes()
    trained = [row for row in there.metrics if row["event"] == "train"]
    assert len(trained) == 4
    assert all(set(row) == TOLD for row in trained), trained[0]
    for path in there.path.glob("clients/*/outbound.jsonl"):
        sent = [json.loads(line) for line in path.read_text().splitlines()]
        asked = [line["asked"] for line in sent if "run" in line]
        round_ = ["query.keys", "query.shares", "train", "query.open"]
        assert asked == ["query", *round_]
        assert not any("norm" in line for line in sent)
        (opened,) = (line["said"]["opened"] for line in sent if line.get("asked") == round_[3])
        assert sorted(opened) == ["masking", "own"]
        assert len(opened["own"]) == 4
    assert list(there.path.glob("clients/*/outbound.jsonl"))
