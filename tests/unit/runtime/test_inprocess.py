"""The in-process runtime hands clients over in groups, so that several can be trained together."""

import pytest

import silotune
from silotune.federation import client
from silotune.federation.client import take_part
from silotune.runtime import inprocess
from tests.conftest import write_tiny_recipe


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """A run whose clients are trained one after another, and its recipe."""
    place = tmp_path_factory.mktemp("alone")
    recipe = write_tiny_recipe(place, tiny_model)
    return recipe, silotune.run(recipe, ["rounds=2"], out=place / "run")


def run_in_groups(monkeypatch, recipe, out, *, group_size, train_group):
    real = inprocess.InProcessClients.__init__

    def grouped(self, *parts, **more):
        real(self, *parts, **{**more, "train_group": train_group, "group_size": group_size})

    monkeypatch.setattr(inprocess.InProcessClients, "__init__", grouped)
    return silotune.run(recipe, ["rounds=2"], out=out)


def test_a_group_is_handed_over_at_once_and_its_answers_may_come_in_any_order(
    alone, tmp_path, monkeypatch
):
    groups = []

    def backwards(worker, group):
        groups.append([asked.data.name for asked in group])
        for asked in reversed(group):
            yield take_part(worker, asked.data, asked.broadcast, asked.own)

    recipe, want = alone
    done = run_in_groups(monkeypatch, recipe, tmp_path / "run", group_size=2, train_group=backwards)
    assert groups == 2 * [["hospital-0", "hospital-1"], ["hospital-2"]]
    assert done.summary["adapter_sha256"] == want.summary["adapter_sha256"]


def test_memory_is_given_back_after_a_round_and_not_after_every_client(
    alone, tmp_path, monkeypatch
):
    given, between = [], []
    monkeypatch.setattr(inprocess, "release_memory", lambda: given.append(1))
    monkeypatch.setattr(client, "release_if_grown", lambda: between.append(1))
    recipe, want = alone
    done = silotune.run(recipe, ["rounds=2"], out=tmp_path / "run")
    assert (len(given), len(between)) == (2, 2 * 3), "rounds, and clients in them"
    assert done.summary["adapter_sha256"] == want.summary["adapter_sha256"]


def test_clients_whose_turn_comes_after_the_deadline_are_named_group_by_group(
    alone, tmp_path, monkeypatch
):
    begun = iter([0.0, 0.0, 1e9, 1e9])  # the round begins, the first group does, then time is up
    monkeypatch.setattr(inprocess.time, "monotonic", lambda: next(begun, 1e9))
    recipe, _ = alone
    done = run_in_groups(monkeypatch, recipe, tmp_path / "run", group_size=2, train_group=None)
    first = [row for row in done.metrics if row["event"] == "train" and row["round"] == 1]
    assert {row["client"]: row["status"] for row in first} == {
        "hospital-0": "ok",
        "hospital-1": "ok",
        "hospital-2": "timeout",
    }
