"""With very many rows, some stand for all where only lengths are wanted, and this is said."""

import dataclasses

import pytest

from silotune.core.errors import DataError
from silotune.data.client_rows import ClientRows
from silotune.federation import recipe_model
from silotune.federation.client_data import ClientData, ScoredTokens, TrainTokens
from silotune.recipes.parse import parse
from silotune.results.run_tables import split_table
from silotune.training.tasks import build_task
from silotune.workflows.data_overview import FEWEST, describe_split
from silotune.workflows.plan import measured_rows

NAMES = [f"client-{n}" for n in range(6)]
ROW = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
ROWS = {name: ClientRows(name, (ROW,) * 8, (ROW,) * 2) for name in NAMES}


def recipe(**more):
    table = {"rounds": 1, "data": {"path": "rows.csv"}, "partition": {"by": "source"}, **more}
    return parse(table, name="test")


def data(made):
    """Clients that say when they are tokenized."""

    def train(name):
        made.append(name)
        return TrainTokens(())

    return {
        name: ClientData(
            name, lambda n=name: train(n), lambda: ScoredTokens((), 0), num_given=(8, 2)
        )
        for name in NAMES
    }


def test_a_plan_tokenizes_the_clients_that_are_asked_first_and_says_so(monkeypatch):
    monkeypatch.setattr(measured_rows, "LOOKED_AT", 20)
    made, run = [], recipe(sampling={"num_clients": 3})
    found, (note,) = measured_rows.some_for_all(run, ROWS, data(made))
    assert made == [], "finding them tokenizes nothing"
    assert list(found) == NAMES
    (cohort,) = measured_rows.cohorts(run, NAMES)
    assert {own.name for own in found.values()} == set(cohort[:2])
    for name in cohort[:2]:
        assert found[name].name == name
    for own in found.values():
        assert own.train is not None
    assert sorted(made) == sorted(cohort[:2]), "once each"
    assert note == (
        "lengths of rows were looked at in 2 of 6 clients, and are taken to be alike in the others"
    )


def test_a_plan_of_few_rows_looks_at_all_of_them():
    found, notes = measured_rows.some_for_all(recipe(), ROWS, data([]))
    assert [own.name for own in found.values()] == NAMES
    assert notes == []


@pytest.fixture
def counted_task():
    """A task that notes how many rows it is asked the lengths of; a row's length is 7."""
    asked = []

    def num_tokens(rows, _):
        asked.append(len(rows))
        return [7] * len(rows)

    return dataclasses.replace(build_task("instruct"), num_tokens=num_tokens), asked


def test_lengths_of_many_rows_are_those_of_some_and_the_table_says_of_how_many(counted_task):
    task, asked = counted_task
    whole = describe_split(ROWS, None, task)
    assert asked == [8] * 6
    assert all("num_measured" not in own for own in whole.values())
    asked.clear()
    some = describe_split(ROWS, None, task, at_most=36)
    assert asked == [6] * 6
    assert {own["num_measured"] for own in some.values()} == {6}
    assert "of rows" in split_table(some)[0]
    assert "of rows" not in split_table(whole)[0]
    asked.clear()
    describe_split(ROWS, None, task, at_most=1)
    assert asked == [FEWEST] * 6


def test_a_row_without_a_length_does_not_cost_the_results_of_a_run(counted_task):
    task, _ = counted_task
    refused = ({"role": "user", "content": "refused"},)

    def num_tokens(rows, _):
        if refused in rows:
            raise DataError("the chat template refuses it")
        return [7] * len(rows)

    rows = {
        "a": ClientRows("a", (ROW, refused), (ROW,)),
        "b": ClientRows("b", (refused,), (ROW,)),
    }
    found = describe_split(rows, None, dataclasses.replace(task, num_tokens=num_tokens))
    assert found["a"]["num_measured"] == 1
    assert found["a"]["tokens"]["max"] == 7
    assert (found["b"]["num_measured"], found["b"]["tokens"]) == (0, {})
    assert split_table(found)[2][:6] == ("b", "1", "1", "-", "-", "-")


def test_warnings_about_the_template_are_from_some_of_very_many_rows(monkeypatch, tokenizer):
    seen = []
    monkeypatch.setattr(
        recipe_model, "template_warnings", lambda _, rows: seen.append(len(rows)) or []
    )
    (note,) = recipe_model.warn_of_template(tokenizer, recipe(), ROWS, at_most=12)
    assert list(recipe_model.warn_of_template(tokenizer, recipe(), ROWS)) == []
    assert seen == [12, 60]
    assert note == (
        "what the model reads of the rows was looked at in 12 of 60; `silotune data` looks at all "
        "of them"
    )
