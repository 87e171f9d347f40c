"""Rows become tokens when their client is first asked, and what a few rows show is found before."""

import json
from collections import Counter

import pytest

import silotune
from silotune.core.errors import DataError
from silotune.federation import client, prepared_rows
from silotune.recipes.parse import load_recipe
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

ALTERNATING = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' and loop.index0 % 2 == 0 %}"
    "{{ raise_exception('the turns must alternate') }}{% endif %}"
    "{% if 'forbidden' in m['content'] %}{{ raise_exception('a word is missing') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_tiny_recipe(tmp_path, tiny_model)


@pytest.fixture
def tokenised(monkeypatch):
    """The rows that were tokenized, in batches."""
    seen, real = [], prepared_rows.prepare_rows

    def prepare_rows(rows, *parts, **more):
        seen.append(tuple(rows))
        return real(rows, *parts, **more)

    monkeypatch.setattr(prepared_rows, "prepare_rows", prepare_rows)
    return seen


def places(parts):
    """How often each part was seen, told by where its rows are from."""
    return Counter(tuple(row.where for row in part) for part in parts)


def asked_in(done):
    return {row["client"] for row in done.metrics if row["event"] == "train"}


def test_only_the_train_rows_of_asked_clients_are_tokenized_if_nothing_is_scored(
    recipe, tokenised, tmp_path
):
    settings = ["sampling.num_clients=1", "evaluate.every=0", "rounds=2"]
    done = silotune.run(recipe, settings, out=tmp_path / "run")
    rows = silotune.check(recipe, settings).rows
    asked = asked_in(done)
    assert len(asked) < len(rows), "otherwise this shows nothing"
    assert places(tokenised) == places(rows[name].train for name in asked)
    told = done.summary["clients"]
    assert {name: told[name]["num_train"] for name in rows} == {
        name: len(own.train) for name, own in rows.items()
    }


def test_clients_that_are_only_scored_have_their_train_rows_left_alone(recipe, tokenised, tmp_path):
    settings = ["sampling.num_clients=1", "rounds=2"]
    done = silotune.run(recipe, settings, out=tmp_path / "run")
    rows = silotune.check(recipe, settings).rows
    asked = asked_in(done)
    assert len(asked) < len(rows)
    want = [*(own.scored for own in rows.values()), *(rows[name].train for name in asked)]
    assert places(tokenised) == places(want), "each part once, whatever the number of rounds"


def test_a_client_without_a_row_that_fits_is_told_before_the_first_round(
    recipe, tokenised, tmp_path
):
    rows = hospital_rows()
    for row in rows:
        if row["source"] == "hospital-2":
            row["question"] += " please" * 30
    write_jsonl(tmp_path / "hospitals.jsonl", rows)
    with pytest.raises(DataError, match="client 'hospital-2': no train row has an answer within"):
        silotune.run(recipe, ["sampling.num_clients=1"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was trained"
    assert {len(rows) for rows in tokenised} == {
        len(silotune.check(recipe).rows["hospital-2"].train)
    }


def talks(extra):
    """The usual rows as messages; `extra` are turns in front of a question of the last client."""
    rows = []
    for n, row in enumerate(hospital_rows()):
        turns = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        rows.append({"source": row["source"], "messages": [*(extra if n == 23 else []), *turns]})
    return rows


def test_turns_that_the_template_refuses_are_told_before_the_first_round(recipe, tmp_path):
    write_jsonl(tmp_path / "hospitals.jsonl", talks([{"role": "user", "content": "Hello."}]))
    (tmp_path / "chat.jinja").write_text(ALTERNATING)
    template = f"data.template={tmp_path / 'chat.jinja'}"
    with pytest.raises(DataError, match=r"hospitals\.jsonl:24: .*the turns must alternate"):
        silotune.run(recipe, [template, "sampling.num_clients=1"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_that_the_template_refuses_costs_its_client_and_not_the_run(recipe, tmp_path):
    rows = talks([])
    rows[23]["messages"][0]["content"] = f"Is this a {'long ' * 5}forbidden word?"
    write_jsonl(tmp_path / "hospitals.jsonl", rows)
    (tmp_path / "chat.jinja").write_text(ALTERNATING)
    done = silotune.run(recipe, [f"data.template={tmp_path / 'chat.jinja'}"], out=tmp_path / "run")
    first = [row for row in done.metrics if row["event"] == "train" and row["round"] == 1]
    status = {row["client"]: row["status"] for row in first}
    assert status == {
        "hospital-0": "ok",
        "hospital-1": "ok",
        "hospital-2": "rows cannot be used",
    }
    (lost,) = (row for row in first if row["status"] != "ok")
    assert "hospitals.jsonl:24" in lost["place"]
    assert "forbidden" not in json.dumps(done.metrics), "a word of a row"
    assert set(done.summary["clients"]) == {"hospital-0", "hospital-1", "hospital-2"}


def test_cut_rows_are_noted_once_when_they_are_seen(recipe, tmp_path):
    class Notes(silotune.Progress):
        def __init__(self):
            self.texts = []

        def note(self, text):
            self.texts.append(text)

    progress = Notes()
    run = load_recipe(recipe, ["train.max_length=50", "rounds=2"])
    silotune.run(run, out=tmp_path / "run", progress=progress)
    noted = [text for text in progress.texts if "truncated to train.max_length" in text]
    assert noted, "otherwise this shows nothing"
    assert len(noted) == len(set(noted)) <= 2 * 3, "one line for each part of each client at most"


def test_every_client_scores_every_adapter_once(recipe, tmp_path, monkeypatch):
    scored, real = [], client.evaluate

    def evaluate(*parts, **more):
        scored.append(more["client"])
        return real(*parts, **more)

    monkeypatch.setattr(client, "evaluate", evaluate)
    silotune.run(recipe, ["rounds=2", "sampling.num_clients=2"], out=tmp_path / "run")
    # the base, the adapter after the first round, and the result
    assert Counter(scored) == dict.fromkeys(("hospital-0", "hospital-1", "hospital-2"), 3)
