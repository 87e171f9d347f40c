"""Rows and a model in memory: the same run as from files, and one error for what does not fit."""

import copy
import datetime
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import silotune
from silotune.core.errors import ConfigError, DataError, ModelError
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe


@pytest.fixture
def recipe(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_tiny_recipe(tmp_path, tiny_model)


def by_client():
    found = {}
    for row in hospital_rows():
        found.setdefault(row["source"], []).append(row)
    return found


def adapters(run) -> bytes:
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_rows_in_memory_make_the_same_run_as_a_file(recipe):
    from_file = silotune.run(recipe, out="runs/file")
    rows = hospital_rows()
    before = copy.deepcopy(rows)
    made = silotune.run(recipe, out="runs/memory", rows=rows)
    assert adapters(made) == adapters(from_file)
    assert rows == before
    first, second = (
        json.loads((r.path / "provenance.json").read_text()) for r in (from_file, made)
    )
    assert first["data"]["sha256"] == second["data"]["sha256"]
    kept = list(Path("runs/rows-in-memory").rglob("*.jsonl"))
    assert len(kept) == 1
    assert kept[0].stat().st_mode & 0o077 == 0
    again = silotune.run(recipe, out="runs/again", rows=iter(hospital_rows()))
    assert adapters(again) == adapters(from_file)
    assert list(Path("runs/rows-in-memory").rglob("*.jsonl")) == kept
    assert silotune.run(resume="runs/memory").summary == made.summary
    with pytest.raises(ConfigError, match="keeps its rows"):
        silotune.run(resume="runs/memory", rows=rows)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        iter,
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        pd.DataFrame,
        lambda rows: pd.DataFrame(rows).astype({"source": "category"}),
        lambda rows: pd.DataFrame(rows, index=[f"row-{n}" for n in range(len(rows))]),
        lambda rows: [{k: np.str_(v) for k, v in row.items()} for row in rows],
    ],
)
def test_every_form_of_rows_is_read_alike(recipe, form):
    expected = silotune.check(recipe).rows
    assert silotune.check(recipe, rows=form(hospital_rows())).rows == expected
    assert not Path("runs").exists()


def test_a_mapping_names_the_clients(recipe):
    found = silotune.check(recipe, rows=by_client()).rows
    assert found == silotune.check(recipe).rows
    numbered = silotune.check(recipe, rows=dict(enumerate(by_client().values())))
    assert list(numbered.rows) == ["0", "1", "2"]


def test_splits_of_a_data_set_are_no_clients(recipe):
    rows = hospital_rows()
    whole = {k: datasets.Dataset.from_list(rows) for k in ("train", "test")}
    found = silotune.check(recipe, rows=datasets.DatasetDict(whole)).rows
    assert set(found) == {"hospital-0", "hospital-1", "hospital-2"}
    assert len(found["hospital-0"].evaluation) == len(found["hospital-0"].train) == 8


def test_keys_about_the_hub_do_not_apply_to_rows_in_memory(recipe):
    checked = silotune.check("workshop", ["data.label=none"], rows=by_client())
    assert len(checked.rows) == 3


def test_values_of_other_libraries_become_plain(recipe):
    rows = [
        {**row, "n": np.int64(3), "day": datetime.date(2026, 1, 2), "x": np.array([1.5, 2.5])}
        for row in hospital_rows()
    ]

    def texts(rows):  # other columns are held out otherwise: a row is decided by all of them
        return {str(row) for own in rows.values() for row in own.train + own.evaluation}

    checked = silotune.check(recipe, rows=rows)
    assert texts(checked.rows) == texts(silotune.check(recipe).rows)


def test_gaps_of_a_data_frame_are_empty_cells(recipe):
    """Whatever pandas writes for them: NaN, None, NaT or NA."""
    rows = hospital_rows()
    frame = pd.DataFrame(rows)
    frame["n"] = pd.Series(range(len(rows)), dtype="Int64").where(lambda n: n > 2)
    frame["day"] = pd.to_datetime("2026-01-02")
    frame.loc[3, "day"] = pd.NaT
    for gap in (None, float("nan"), pd.NA):
        frame["answer"] = frame["answer"].astype(object)
        frame.loc[3, "answer"] = gap
        with pytest.raises(DataError, match=r"jsonl:4: column 'answer' is missing"):
            silotune.check(recipe, rows=frame)
        rest = silotune.check(recipe, ["data.skip_empty=true"], rows=frame)
        assert sum(len(own.train) + len(own.evaluation) for own in rest.rows.values()) == (
            len(rows) - 1
        )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the rows are empty"),
        ({}, "no clients"),
        ("rows.csv", "set data.path"),
        (b"x", "set data.path"),
        (7, "type int"),
        (object(), "type object"),
        ([1, 2], "row 1 has the type int"),
        (["text"], "row 1 has the type str"),
        ([{"question": "a", "answer": b"Geheim"}], "row 1, 'answer' has the type bytes"),
        ([{3: "Geheim"}], "row 1 has a name that is not a text"),
        ({"question": ["Geheim"], "answer": ["Geheim"]}, "client 'question', row 1 has the type"),
        ({"north": []}, "the rows of 'north' are empty"),
        ({"a/b": [{"question": "a", "answer": "b"}]}, "client 'a/b' cannot be kept"),
        ({"..": [{"question": "a", "answer": "b"}]}, "cannot be kept"),
        ({"A": [{"q": "a"}], "a": [{"q": "a"}]}, "differs from another only in case"),
        ({"north": [{"q": "a"}], "test": [{"q": "b"}]}, "client 'test' cannot be kept"),
        ({"north": [{"q": "a"}], "Val": [{"q": "b"}]}, "client 'Val' cannot be kept"),
        ({"north": [{"q": "a"}], "training": [{"q": "b"}]}, "client 'training' cannot be kept"),
        # Bug: a folder took them for shards, so two clients became one data set
        ({f"site-0000{n}-of-00002": [{"q": "a"}] for n in (0, 1)}, "client 'site-00000-of-00002'"),
        ({None: [{"q": "a"}]}, "a client's name has the type NoneType"),
        ([{"question": "Geheim"}] * 9, "no known format fits"),
    ],
    ids=lambda value: "an object" if type(value) is object else repr(value),
)
def test_rows_that_do_not_fit_are_one_error(recipe, rows, said):
    with pytest.raises(DataError, match=said) as found:
        silotune.check(recipe, rows=rows)
    assert "Geheim" not in str(found.value)


def test_a_row_that_contains_itself_is_an_error(recipe):
    row: dict = {"question": "a"}
    row["answer"] = [row]
    with pytest.raises(DataError, match="nested too deeply"):
        silotune.check(recipe, rows=[row])


def test_rows_that_were_changed_on_disk_are_refused(recipe):
    silotune.run(recipe, out="runs/first", rows=hospital_rows())
    (kept,) = Path("runs/rows-in-memory").rglob("*.jsonl")
    write_jsonl(kept, hospital_rows(2))
    with pytest.raises(DataError, match="has changed since it was written"):
        silotune.run(recipe, out="runs/second", rows=hospital_rows())


# --- a model


@pytest.fixture
def pair(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(
        tiny_model
    )


def test_a_model_in_memory_makes_the_same_run_and_is_not_changed(recipe, pair):
    model, tokenizer = pair
    model.config.architectures = None  # saving would write it
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    made = silotune.run(recipe, out="runs/memory", model=(model, tokenizer))
    assert model.config.to_dict() == config
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert adapters(made) == adapters(silotune.run(recipe, out="runs/file"))
    silotune.run(recipe, out="runs/again", model=(model, tokenizer))
    assert len(list(Path("runs/models-in-memory").iterdir())) == 1
    assert made.ask("What is a1?", max_new_tokens=2) is not None


def test_changed_weights_are_another_model(recipe, pair):
    model, tokenizer = pair
    first = silotune.run(recipe, out="runs/a", model=(model, tokenizer))
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    second = silotune.run(recipe, out="runs/b", model=(model, tokenizer))
    assert first.config.model.name != second.config.model.name
    assert first.summary["overall"] != second.summary["overall"]


def test_what_is_no_plain_model_is_one_error(recipe, pair):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = pair
    for given in (7, model, (model,), (model, None), "name", (tokenizer, model), b"x", {}):
        with pytest.raises(ConfigError, match="pair of a transformers model and its tokenizer"):
            silotune.check(recipe, model=given)
    with pytest.raises(ModelError, match="without an adapter"):
        silotune.check(recipe, model=(torch.nn.Linear(2, 2), tokenizer))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ModelError, match="meta device"):
        silotune.check(recipe, model=(empty, tokenizer))
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        silotune.check(recipe, model=(peft, tokenizer))


def test_rows_and_model_can_be_previewed_planned_and_compared(recipe, pair):
    seen = silotune.preview(recipe, num_samples=1, rows=by_client(), model=pair)
    assert len(seen.clients) == 3
    assert len(seen.samples) == 1
    made = silotune.plan(recipe, measured=False, rows=by_client(), model=pair)
    assert made.traffic.num_clients == 3
    keys = ["rounds=1", "compare.seeds=1"]
    done = silotune.compare(recipe, keys, out="runs/c", rows=by_client(), model=pair)
    assert done.result["arms"]


def test_rows_and_model_can_be_swept_audited_and_asked_about(recipe, pair, monkeypatch):
    monkeypatch.setattr("silotune.workflows.audit.audit.NUM_OTHERS", 2)
    keys = ["rounds=1", "train.local_steps=1", "runtime.threads=1"]
    swept = silotune.sweep(
        recipe, keys, runs=["train.lr=1e-3"], out="runs/s", jobs=1, rows=by_client(), model=pair
    )
    alone = silotune.run(recipe, [*keys, "train.lr=1e-3"], out="runs/r")
    assert adapters(swept.best) == adapters(alone)
    found = silotune.audit(
        recipe, keys, canaries=10, out="runs/a", rows=hospital_rows(), model=pair
    )
    assert found.result["attack"] == "canary rows"
    with pytest.raises(ConfigError, match="rows and model do not apply"):
        silotune.audit(alone.path, rows=hospital_rows())
    quiz = [{"question": "Is it?", "context": {"contexts": ["It is."]}, "final_decision": "yes"}]
    for data, said in (
        (quiz, None),
        ({"a": quiz, "b": quiz}, "given by name"),
        ([{"question": "Geheim"}], "pubmedqa|column"),
    ):
        asked = silotune.Questions(
            suites=["pubmedqa"], data={"pubmedqa": data}, max_new_tokens=2, base=False
        )
        if said is None:
            scores = silotune.evaluate(alone, asked).scores["models"]["federated"]["pubmedqa"]
            assert all(one["num_items"] == 1 for one in scores.values())
            continue
        with pytest.raises(DataError, match=said) as error:
            silotune.evaluate(alone, asked)
        assert "Geheim" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "rounds: is missing"),
        ({"rounds": "3", "data": {"path": "x"}}, "rounds: should be a number"),
        ({"rounds": 3, "data": "x"}, "data: is a section"),
        ({"rounds": 3, "data": {"path": "x"}, "rouns": 1}, "Did you mean rounds"),
        ({"rounds": 3, "data": {"path": "x"}, "train": object()}, "train: is a section"),
        ({"rounds": 3, "data": {"path": "x", "prompt": "{a}"}}, "prompt and completion belong"),
    ],
)
def test_a_recipe_in_python_gets_the_errors_of_a_recipe_in_a_file(given, said):
    """Bug: pydantic's own error, which is no SilotuneError."""
    with pytest.raises(ConfigError, match=said):
        silotune.RunConfig(**given)


def test_contradictions_of_a_recipe_in_python_are_found():
    """Bug: only recipes from a file and overrides were checked for them."""
    run = silotune.RunConfig(rounds=1, data={"path": "hospitals"}, evaluate={"every": 0})
    best = run.checkpoint.model_copy(update={"keep": "best"})
    with pytest.raises(ConfigError, match=r"checkpoint\.keep: 'best' needs held-out losses"):
        silotune.check(run.model_copy(update={"checkpoint": best}))
