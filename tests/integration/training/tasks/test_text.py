"""Continued pre-training, from a file of texts to an adapter that scores and answers."""

from copy import deepcopy

import pytest

import silotune
from silotune.core.errors import ConfigError, Declined
from silotune.data.clients import load_clients
from silotune.federation.client_config import ClientConfig, load_client_config
from silotune.federation.client_recipe import own_recipe, own_rows
from silotune.federation.simulated_clients import write_client_configs
from silotune.recipes.parse import parse
from silotune.workflows.check import check
from tests.conftest import changed, small_table, write_jsonl

NOTES = [
    {"note": f"Note {i} of {c}: all is {'very ' * (i % 3)}well.", "source": c}
    for c in ("north", "south")
    for i in range(8)
]


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny_model):
    data = write_jsonl(tmp_path_factory.mktemp("texts") / "notes.jsonl", NOTES)
    return small_table(tiny_model, data) | {"task": "text"}


def recipe(table, **changes):
    return parse(changed(deepcopy(table), {"data__text": "note", **changes}))


def test_a_run_learns_texts_and_everything_after_it_works(table, tmp_path):
    cfg = recipe(table, train__packing=True)
    run = silotune.run(cfg, out=tmp_path / "run")
    summary = run.summary
    assert summary["task"] == "text"
    assert summary["overall"]["federated_loss"] < summary["overall"]["base_loss"]
    assert run.samples == []
    found = silotune.evaluate(run).scores["models"]["federated"]["held-out"]["clients"]
    assert found["north"].keys() == {"num_items", "loss"}
    assert found["north"]["loss"] == pytest.approx(summary["clients"]["north"]["federated_loss"])
    assert isinstance(run.ask("Note", max_new_tokens=2), str)
    shown = silotune.preview(cfg, num_samples=1).samples[0]
    assert [kind for kind, _ in shown.pieces] == ["learned"]


def test_rows_are_protected_like_others(table, tmp_path):
    cfg = recipe(
        table,
        rounds=1,
        evaluate={"every": 0},
        privacy={"unit": "record", "noise_multiplier": 1.0, "delta": 1e-3},
    )
    run = silotune.run(cfg, out=tmp_path / "run")
    assert run.summary["privacy"]["clients"].keys() == {"north", "south"}


def test_simulated_clients_read_the_same_texts_from_their_own_files(table, tmp_path):
    run = check(recipe(table)).run
    rows = load_clients(run.data, run.partition, seed=run.seed, task="text")
    paths = write_client_configs(
        tmp_path / "clients", rows, run, model=run.model.name, state=lambda name: tmp_path / name
    )
    own = load_client_config(paths["north"])
    there = own_rows(own_recipe(run, own), own)
    assert there.train == rows["north"].train
    assert there.evaluation == rows["north"].evaluation


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"tasks": ["instruct"]}, "task = 'text' is not in limits.tasks"),
        ({"columns": ["source"]}, "data.text uses column 'note'"),
        ({"tasks": ["text"], "columns": ["note"]}, None),
    ],
)
def test_a_client_decides_whether_its_texts_are_learned(table, tmp_path, limits, said):
    run = check(recipe(table)).run
    data = {"path": run.data.path}
    own = ClientConfig(name="north", model=run.model.name, data=data, limits=limits)
    if said is None:
        assert own_recipe(run, own).task == "text"
        return
    with pytest.raises(Declined, match=said):
        own_recipe(run, own)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("prompt", "{note}", 'only has an effect with task = "instruct"'),
        ("system", "Be brief.", 'only has an effect with task = "instruct"'),
        ("labels", ["a", "b"], 'only has an effect with task = "classify"'),
    ],
)
def test_keys_of_other_tasks_are_refused(table, key, value, said):
    more = {"data__completion": "{note}"} if key == "prompt" else {}
    with pytest.raises(ConfigError, match=f"data.{key}: {said}"):
        recipe(table, **{f"data__{key}": value}, **more)
