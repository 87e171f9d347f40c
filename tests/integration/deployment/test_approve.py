"""A run waits at a client until its people have read what it asks for, and agreed."""

import json

import pytest
import tomli_w

from silotune.core.errors import ConfigError
from silotune.core.types import AWAITS_CONSENT
from silotune.deployment.approve import _others, describe, find_request
from silotune.deployment.client_status import Activity, client_status, status_lines
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.join import init, take_kit
from silotune.deployment.queue import submit
from silotune.federation.client_config import ClientConfig
from silotune.federation.operator_log import entries, verify
from silotune.federation.run_folder import RunFolder
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.submit import travelling
from silotune.runtime.payload import Parcel
from silotune.runtime.real_client import Deployed
from silotune.runtime.recipe_hash import named_sha256
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe
from tests.forked import run_typed


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A consortium with one client, as the documented commands make them, and a submitted run."""
    folder = tmp_path_factory.mktemp("consent")
    recipe = write_tiny_recipe(folder, tiny_model)
    Consortium.create(folder / "consortium", name="demo", address="127.0.0.1")
    request, _ = init("north", folder / "north")
    consortium = Consortium.open(folder / "consortium")
    kit, _ = consortium.approve(request)
    rows = [{k: v for k, v in row.items() if k != "source"} for row in hospital_rows()]
    write_jsonl(folder / "rows.jsonl", rows)
    take_kit(kit, folder / "north", data=folder / "rows.jsonl", model=tiny_model)
    submit(folder / "consortium", recipe)
    return folder


@pytest.fixture
def asked(place, tmp_path):
    """Call it with [runs] of a client: what it answers to the question who it is."""
    own = place / "north" / "client.toml"
    before = own.read_text()
    (run,) = (place / "consortium" / "runs").iterdir()
    made = RunFolder.open(run)

    def ask(runs: dict, run_id: str = "", **changes) -> dict:
        run = travelling(made.run).model_copy(update=changes)
        recipe = run.model_dump_json(serialize_as_any=True)
        own.write_text(before.replace("[runs]\n", f"[runs]\n{tomli_w.dumps(runs)}"))
        about = {"kind": "query", "recipe": recipe, "run": run_id or made.run_id()}
        return dict(Deployed(own).answer(Parcel({**about, "version": "0.4", "parcel": {}})).about)

    yield ask
    own.write_text(before)


def test_a_run_waits_is_shown_in_plain_words_and_runs_once_it_is_approved(place, asked):
    north = place / "north"
    activity = Activity(north, north / "state")
    answer = asked({"approve": "ask"})
    assert answer["failure"]["code"] == AWAITS_CONSENT
    assert client_status(north)["runs"][0]["answers"] == 1, "it is listed as all that leaves"
    run = client_status(north)["asks"][0]["run"]
    command = f"silotune client approve {run[:8]}"
    assert any(text.endswith(command) for text in status_lines(client_status(north)))
    assert any(text.endswith(command) for text in activity.news())

    shown = dict(describe(north, find_request(north, None)))
    assert shown["columns"].endswith("out of limits.columns: question, answer")
    assert shown["task"].startswith("instruct: ")
    assert "fedavg" in shown["algorithm"]
    assert shown["privacy"] == "none: the server reads each update as it is"
    assert shown["others"] == "the server does not say who else takes part"
    assert Consortium.open(place / "consortium").fingerprint() in shown["server"]
    assert shown["training"].startswith("3 rounds, in each 2 steps of 2 rows")
    assert "in each round" in shown["sends"]

    said = run_typed(["client", "approve", run[:8], "--yes"], cwd=place)
    assert said.returncode == 0, said.stderr
    assert f"run {run[:8]}: approved" in said.stdout
    assert shown["recipe"] in said.stdout
    assert "report" in asked({"approve": "ask"})
    assert client_status(north)["asks"] == []

    said = run_typed(["client", "approve", run, "--no", "--folder", north], cwd=place)
    assert f"run {run[:8]}: declined" in said.stdout
    assert asked({"approve": "ask"})["failure"]["code"] == "declined"
    answers = [row["what"] for row in entries(north) if row["what"].startswith("run ")]
    assert answers == ["run asks for consent", "run approved", "run declined"]
    refused = entries(north, "refused")
    assert [row["run"] for row in refused] == [run]
    assert "its people declined this run" in refused[0]["why"]
    assert asked({"approve": "ask"})["failure"]["code"] == "declined"
    assert verify(north).lines >= 3


def test_a_recipe_that_changes_after_the_answer_says_so_everywhere(place, asked):
    north = place / "north"
    asked({"approve": "ask"}, "d4")
    run_typed(["client", "approve", "d4", "--yes", "--folder", north], cwd=place)
    assert "report" in asked({"approve": "ask"}, "d4")
    activity = Activity(north, north / "state")
    assert asked({"approve": "ask"}, "d4", rounds=7)["failure"]["code"] == AWAITS_CONSENT
    (line,) = [text for text in activity.news() if "waits" in text and "d4" in text]
    assert "because its recipe has changed since you answered" in line
    (own,) = [found for found in client_status(north)["asks"] if found["run"] == "d4"]
    assert own["changed"]
    shown = dict(describe(north, find_request(north, "d4")))
    assert shown["run"].endswith("its recipe has changed since it was answered")
    last = entries(north, "run asks for consent")[-1]
    assert (last["run"], last["why"]) == ("d4", "its recipe has changed since it was approved")
    run_typed(["client", "approve", "d4", "--no", "--folder", north], cwd=place)


def test_without_an_answer_at_the_terminal_nobody_has_agreed(place, asked):
    asked({"approve": "ask"}, "b2")
    said = run_typed(["client", "approve", "b2", "--folder", place / "north"], cwd=place)
    assert said.returncode != 0
    assert asked({"approve": "ask"}, "b2")["failure"]["code"] == AWAITS_CONSENT


def test_a_run_that_nobody_asked_about_is_a_clear_error(place, tmp_path):
    with pytest.raises(ConfigError, match="no run matches 'ffff'"):
        find_request(place / "north", "ffff")
    with pytest.raises(ConfigError, match="is not the folder of a client"):
        find_request(tmp_path, None)
    both = ["client", "approve", "a", "--yes", "--no", "--folder", place / "north"]
    assert "contradict each other" in run_typed(both, cwd=place).stderr


def test_a_recipe_of_the_clients_own_is_the_one_that_was_submitted(place, asked):
    """The hash is the same although the server keeps it with a day, its threads and its paths."""
    name = next(place.glob("*.toml")).name
    listed = {"approve": "listed", "recipes": [f"../{name}"]}
    assert "report" in asked(listed)
    own = named_sha256(place / name, place)
    assert "report" in asked({"approve": "listed", "recipes": [own]})
    refused = asked({"approve": "listed", "recipes": ["0" * 64]})["failure"]
    assert refused["code"] == "declined"
    assert own in refused["place"], "so that it can be copied into client.toml"
    assert json.dumps(str(place)) not in json.dumps(refused)


def test_with_secure_sums_it_says_who_may_be_in_the_sum():
    roster = {name: digit * 32 for name, digit in (("east", "1"), ("north", "2"), ("south", "3"))}
    own = {"name": "north", "data": {"path": "x"}}
    pinned = ClientConfig.model_validate({**own, "secure_sum": {"roster": roster}})
    sums = {"secure_sum": {"kind": "masks", "range": 1.0}}
    run = RunConfig.model_validate({"rounds": 1, "data": {"path": "x"}, **sums})
    assert _others(run, pinned) == "only clients on your roster: east, south"
    assert _others(run, ClientConfig.model_validate(own)).endswith("nobody, so none at all")
