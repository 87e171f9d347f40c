import hashlib
import json
import re

import pytest
from pydantic import ValidationError

import silotune
from silotune.core.errors import ConfigError, DataError
from silotune.data import client_rows as assembling
from silotune.data.cells import FIX_EMPTY
from silotune.data.client_rows import ClientRows
from silotune.data.clients import (
    cut_clients,
    fingerprint,
    load_client,
    load_client_quietly,
    load_clients,
)
from silotune.data.files import EXAMPLES
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from silotune.data.server_rows import load_server_rows
from silotune.recipes.parse import parse
from tests.unit.data.row_files import SECRET, error_of, make_rows, write

BY_SOURCE = PartitionConfig(by="source")


def load(path, partition=None, *, seed=17, **settings):
    return load_clients(DataConfig(path=str(path), **settings), partition, seed=seed)


def questions(talks):
    return [talk[0]["content"] for talk in talks]


def test_bad_rows_are_reported_together(tmp_path):
    rows = make_rows(2) + [{"source": "north", "question": SECRET, "answer": ""}] * 23
    path = write(tmp_path / "data.jsonl", rows)
    lines = error_of(load, path, BY_SOURCE).split("\n")
    assert lines == [
        *(f"{path}:{n}: column 'answer' is empty." for n in range(3, 23)),
        "and 3 more rows",
        FIX_EMPTY,
    ]


def test_bad_held_out_rows_are_found_at_load_time(tmp_path):
    train = write(tmp_path / "a.jsonl", make_rows(4))
    held = write(tmp_path / "b.jsonl", [{"source": "north", "question": "a", "answer": " "}])
    assert f"{held}:1: " in error_of(load, train, BY_SOURCE, eval_path=str(held))


# --- what data.path means ---


def test_the_named_example_gives_five_institutes():
    clients = load("medquad_mini", BY_SOURCE)
    assert {name: (len(c.train), len(c.evaluation)) for name, c in clients.items()} == {
        "CancerGov": (51, 20),
        "GARD": (120, 20),
        "GHR": (116, 20),
        "NIDDK": (120, 20),
        "NINDS": (120, 20),
    }


def test_a_hub_data_set_is_read_through_a_stand_in(monkeypatch):
    asked = []

    def stand_in(*args, **settings):
        asked.append((args, settings))
        return make_rows(6) + [{"source": "south", "question": SECRET, "answer": "b"}] * 2

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    clients = load("org/name", BY_SOURCE, name="en", split="test", revision="abc")
    assert asked == [(("org/name", "en"), {"split": "test", "revision": "abc"})]
    assert list(clients) == ["north", "south"]
    assert "partition.by = 'x': org/name, train, row 1 and" in error_of(
        load, "org/name", PartitionConfig(by="x")
    )


def hub_with(monkeypatch, **splits):
    """A stand-in for the hub; returns the list of the splits that were asked for."""
    asked = []

    def stand_in(path, name, *, split, revision):
        asked.append((path, name, split, revision))
        return splits[split]

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    monkeypatch.setattr("silotune.data.files.why_offline", lambda: None)
    return asked


def test_a_split_of_the_hub_is_the_held_out_part(monkeypatch):
    train, test = make_rows(5) + make_rows(3, "south"), make_rows(2) + make_rows(1, "south")
    asked = hub_with(monkeypatch, train=train, test=test)
    settings = {"name": "en", "revision": "abc"}
    clients = load("org/name", BY_SOURCE, eval_split="test", **settings)
    assert asked == [("org/name", "en", "train", "abc"), ("org/name", "en", "test", "abc")]
    assert {n: (len(c.train), len(c.evaluation)) for n, c in clients.items()} == {
        "north": (5, 2),
        "south": (3, 1),
    }


def test_a_bad_row_of_a_held_out_split_is_named_with_its_split(monkeypatch):
    test = [{"source": "north", "question": SECRET, "answer": ""}]
    hub_with(monkeypatch, train=make_rows(4), test=test)
    text = error_of(load, "org/name", BY_SOURCE, eval_split="test")
    assert "org/name, test, row 1: column 'answer' is empty." in text


def test_a_held_out_split_that_is_not_there_is_named(monkeypatch):
    hub_with(monkeypatch, train=make_rows(4))
    text = error_of(load, "org/name", BY_SOURCE, eval_split="tset")
    assert "its split 'tset' could not be read from the hub" in text
    assert "data.eval_split" in text


def test_a_real_client_may_score_on_a_split_of_the_hub(monkeypatch):
    hub_with(monkeypatch, train=make_rows(4), test=make_rows(3))
    client = load_client(DataConfig(path="org/name", eval_split="test"), "north", seed=1)
    assert (len(client.train), len(client.evaluation)) == (4, 3)


def test_a_real_client_is_told_how_its_folder_was_read(tmp_path):
    """Bug: only a simulation said that one of two held-out parts is not used."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for part in ("train", "validation", "test"):
        write(folder / f"{part}.jsonl", make_rows(4, part))
    cfg = DataConfig(path=str(folder))
    _, notes = cut_clients(cfg, PartitionConfig(kind="iid", num_clients=2), seed=1)
    assert "test" in notes[0]
    assert load_client(cfg, "north", seed=1).notes == tuple(notes)
    assert load_client_quietly(cfg, "north", seed=1)[0].notes == tuple(notes)


def test_a_hub_data_set_may_be_scored_on_a_file(monkeypatch, tmp_path):
    asked = hub_with(monkeypatch, train=make_rows(4))
    held = write(tmp_path / "held.csv", make_rows(2))
    clients = load("org/name", BY_SOURCE, eval_path=str(held))
    assert (len(asked), len(clients["north"].evaluation)) == (1, 2)


@pytest.mark.parametrize("setting", ["name", "split", "eval_split", "revision"])
def test_hub_settings_for_a_file_are_refused(tmp_path, setting):
    path = write(tmp_path / "data.jsonl", make_rows(4))
    text = error_of(load, path, BY_SOURCE, kind=ConfigError, **{setting: "x"})
    assert f"data.{setting}: only for data sets on the hub" in text


# --- folders ---


def test_a_folder_with_train_and_eval_is_one_data_set(tmp_path):
    write(tmp_path / "train.csv", make_rows(4) + make_rows(3, "south"))
    write(tmp_path / "eval.jsonl", make_rows(2) + make_rows(1, "south"))
    (tmp_path / "README.md").write_text("about")
    clients = load(tmp_path, BY_SOURCE)
    assert {n: (len(c.train), len(c.evaluation)) for n, c in clients.items()} == {
        "north": (4, 2),
        "south": (3, 1),
    }


def test_a_folder_with_train_alone_holds_out_rows(tmp_path):
    path = write(tmp_path / "train.jsonl", make_rows(10))
    found = load(tmp_path, BY_SOURCE)["north"]
    assert found == load(path, BY_SOURCE)["north"]
    assert len(found.train) + len(found.evaluation) == 10


def test_a_folder_of_files_is_one_client_per_file(tmp_path):
    write(tmp_path / "south.csv", make_rows(5))
    write(tmp_path / "north.parquet", make_rows(10))
    (tmp_path / ".hidden.csv").write_text("")
    clients = load(tmp_path)
    assert list(clients) == ["north", "south"]
    assert [c.name for c in clients.values()] == ["north", "south"]
    assert [len(c.train) + len(c.evaluation) for c in clients.values()] == [10, 5]


def test_a_folder_of_files_may_have_a_folder_of_held_out_files(tmp_path):
    for name in ("north", "south"):
        write(tmp_path / "train" / f"{name}.jsonl", make_rows(3))
        write(tmp_path / "held" / f"{name}.csv", make_rows(1))
    clients = load(tmp_path / "train", eval_path=str(tmp_path / "held"))
    assert {n: (len(c.train), len(c.evaluation)) for n, c in clients.items()} == {
        "north": (3, 1),
        "south": (3, 1),
    }


def test_a_folder_of_files_refuses_a_partition(tmp_path):
    write(tmp_path / "north.csv", make_rows(5))
    text = error_of(load, tmp_path, BY_SOURCE, kind=ConfigError)
    assert "holds one file per client, so [partition] has nothing to split." in text
    assert load(tmp_path, PartitionConfig())  # an empty table says nothing


def test_a_held_out_file_for_a_folder_of_clients_is_refused(tmp_path):
    write(tmp_path / "train" / "north.csv", make_rows(5))
    held = write(tmp_path / "held.csv", make_rows(5))
    text = error_of(load, tmp_path / "train", kind=ConfigError, eval_path=str(held))
    assert (
        "does not have the same layout as data.path.\n  Use a folder with one file per client."
        in text
    )


@pytest.mark.parametrize("setting", [{"eval_path": "x.csv"}, {"eval_fraction": 0.5}])
def test_settings_for_held_out_rows_that_are_there_are_refused(setting):
    text = error_of(load, "medquad_mini", BY_SOURCE, kind=ConfigError, **setting)
    assert f"data.{next(iter(setting))}: 'medquad_mini' already holds its held-out rows" in text


def test_a_missing_eval_path_is_named(tmp_path):
    path = write(tmp_path / "data.csv", make_rows(5))
    text = error_of(load, path, BY_SOURCE, eval_path=str(tmp_path / "dat.csv"))
    assert "dat.csv: there is no such file or folder. Did you mean 'data.csv'?" in text


# --- rows become clients ---


def test_ten_csv_rows_make_two_clients(tmp_path):
    rows = [{**row, "source": "south"} if n % 2 else row for n, row in enumerate(make_rows(10))]
    clients = load(write(tmp_path / "ten.csv", rows), BY_SOURCE)
    assert list(clients) == ["north", "south"]
    for start, client in enumerate(clients.values()):
        mine = [f"q{n}?" for n in range(start, 10, 2)]
        kept, held = questions(client.train), questions(client.evaluation)
        assert held == [q for q in mine if q not in kept], "so do the others"
        assert kept == [q for q in mine if q not in held], "kept rows stay in file order"


def test_the_split_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "data.jsonl", make_rows(40))
    first, second = load(path, BY_SOURCE, seed=1), load(path, BY_SOURCE, seed=1)
    assert first == second
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(load(path, BY_SOURCE, seed=2)) != fingerprint(first)


def test_a_new_client_changes_no_other(tmp_path):
    rows = make_rows(20) + make_rows(20, "south")
    before = load(write(tmp_path / "a.jsonl", rows), BY_SOURCE)
    after = load(write(tmp_path / "b.jsonl", make_rows(9, "east") + rows), BY_SOURCE)
    assert {name: after[name] for name in before} == before


def test_no_client_trains_on_a_row_that_another_one_holds_out(tmp_path):
    for name in ("north", "south"):
        write(tmp_path / f"{name}.jsonl", make_rows(40, "both"))
    clients = load(tmp_path)
    assert clients["north"].evaluation == clients["south"].evaluation


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("num_rows", "fraction"), [(2, 0.2), (2, 0.9), (3, 0.01), (3, 0.99)])
def test_a_client_keeps_and_holds_out_at_least_one_row(tmp_path, num_rows, fraction, seed):
    path = write(tmp_path / "data.jsonl", make_rows(num_rows))
    client = load(path, BY_SOURCE, eval_fraction=fraction, seed=seed)["north"]
    assert len(client.train) >= 1
    assert len(client.evaluation) >= 1
    assert len(client.train) + len(client.evaluation) == num_rows


def test_a_client_with_one_row_is_named(tmp_path):
    path = write(tmp_path / "data.jsonl", make_rows(4) + make_rows(1, "south"))
    assert "client 'south' has 1 row, but needs at least 2" in error_of(load, path, BY_SOURCE)


def test_iid_cuts_both_parts(tmp_path):
    train = write(tmp_path / "a.jsonl", make_rows(10))
    held = write(tmp_path / "b.jsonl", make_rows(5))
    cut = PartitionConfig(kind="iid", num_clients=3)
    clients = load(train, cut, eval_path=str(held))
    assert list(clients) == ["client-00", "client-01", "client-02"]
    assert sorted(len(c.train) for c in clients.values()) == [3, 3, 4]
    assert sorted(len(c.evaluation) for c in clients.values()) == [1, 2, 2]


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_leaves_every_client_enough_rows(tmp_path, seed):
    path = write(tmp_path / "a.jsonl", make_rows(12) + make_rows(12, "south"))
    cut = PartitionConfig(kind="dirichlet", num_clients=8, alpha=0.01, label="source")
    clients = load(path, cut, seed=seed)
    assert len(clients) == 8
    assert sum(len(c.train) + len(c.evaluation) for c in clients.values()) == 24


def test_dirichlet_gives_a_client_one_mix_to_learn_and_to_be_scored_on(tmp_path):
    # labels that only one part has must not shift the draws of the others
    train = make_rows(1, "alps") + make_rows(300) + make_rows(300, "south")
    held = make_rows(1, "east") + make_rows(100) + make_rows(100, "south")
    paths = write(tmp_path / "a.jsonl", train), write(tmp_path / "b.jsonl", held)
    cut = PartitionConfig(kind="dirichlet", num_clients=3, alpha=0.3, label="source")
    for client in load(paths[0], cut, eval_path=str(paths[1])).values():
        assert len(client.evaluation) == pytest.approx(len(client.train) / 3, abs=3)


def characters(row):
    """Turns of a conversation, or text and pair."""
    if isinstance(row, dict):
        return len(row["text"] + row["text_pair"])
    return len("".join(turn["content"] for turn in row))


def test_length_cuts_from_short_rows_to_long_ones(tmp_path):
    # question and answer together: the lengths of one are those of the other, turned around
    rows = [
        {"question": "q" * (1 + 7 * n % 20), "answer": "a" * (1 + 3 * n % 20)} for n in range(20)
    ]
    path = write(tmp_path / "data.jsonl", rows)
    clients = load(path, PartitionConfig(kind="length", num_clients=4))
    assert [len(c.train) + len(c.evaluation) for c in clients.values()] == [5, 5, 5, 5]
    found = [n for c in clients.values() for n in sorted(map(characters, c.train + c.evaluation))]
    assert found == sorted(len(r["question"]) + len(r["answer"]) for r in rows)


def test_held_out_rows_are_as_long_as_those_that_a_client_learns(tmp_path):
    rows = [{"question": "q", "answer": "a" * n} for n in range(1, 61)]
    train = write(tmp_path / "a.jsonl", rows)
    held = write(tmp_path / "b.jsonl", rows[::-5])
    cut = PartitionConfig(kind="length", num_clients=3)
    for client in load(train, cut, eval_path=str(held)).values():
        own = [characters(row) for row in client.train]
        assert len(client.evaluation) == 4
        assert all(min(own) <= characters(row) <= max(own) for row in client.evaluation)


def test_length_of_a_pair_to_classify_is_that_of_both_texts(tmp_path):
    rows = [{"text": "t" * n, "text_pair": "p" * (13 - n // 2), "label": 1} for n in range(1, 13)]
    path = write(tmp_path / "data.jsonl", rows)
    cut = PartitionConfig(kind="length", num_clients=2)
    clients = load_clients(DataConfig(path=str(path)), cut, seed=1, task="classify")
    short, long = ([characters(r) for r in c.train + c.evaluation] for c in clients.values())
    assert max(short) <= min(long)
    assert sorted(short + long) == sorted(n + 13 - n // 2 for n in range(1, 13))


def topic_rows(num_rows):
    """Two topics of questions; the answers are of the other topics."""
    words = [("heart pulse", "skin rash"), ("skin rash", "heart pulse")]
    return [
        {"question": f"{words[n % 2][0]} {n}?", "answer": words[n % 2][1]} for n in range(num_rows)
    ]


def test_cluster_cuts_by_what_is_asked_in_both_parts(tmp_path):
    train = write(tmp_path / "a.jsonl", topic_rows(20))
    held = write(tmp_path / "b.jsonl", topic_rows(6))
    cut = PartitionConfig(kind="cluster", num_clients=2)
    clients = load(train, cut, eval_path=str(held), system="heart pulse")
    for client, word in zip(clients.values(), ("heart", "skin"), strict=True):
        assert (len(client.train), len(client.evaluation)) == (10, 3)
        for row in client.train + client.evaluation:
            assert row[1]["content"].startswith(word)
    assert clients == load(train, cut, eval_path=str(held), system="heart pulse")


def test_cluster_cuts_texts_to_classify_too(tmp_path):
    rows = [{"text": r["question"], "text_pair": "x", "label": 1} for r in topic_rows(12)]
    path = write(tmp_path / "data.jsonl", rows)
    cut = PartitionConfig(kind="cluster", num_clients=2)
    clients = load_clients(DataConfig(path=str(path)), cut, seed=1, task="classify")
    words = [{r["text"].split()[0] for r in c.train + c.evaluation} for c in clients.values()]
    assert words == [{"heart"}, {"skin"}]


@pytest.mark.parametrize("kind", ["length", "cluster"])
def test_each_client_has_a_row_to_learn_and_one_to_hold_out(tmp_path, kind):
    path = write(tmp_path / "data.jsonl", make_rows(8))
    clients = load(path, PartitionConfig(kind=kind, num_clients=4))
    assert [len(c.train) + len(c.evaluation) for c in clients.values()] == [2, 2, 2, 2]


def foreign(partitioner, num_clients=None, **options):
    return PartitionConfig(
        kind="flwr-datasets", partitioner=partitioner, num_clients=num_clients, options=options
    )


def test_a_class_of_flwr_datasets_cuts_by_a_column(tmp_path):
    rows = make_rows(10) + make_rows(10, "south") + make_rows(10, "east")
    path = write(tmp_path / "data.jsonl", rows)
    cut = foreign("ShardPartitioner", 3, partition_by="source", num_shards_per_partition=1)
    clients = load(path, cut)
    assert list(clients) == ["client-00", "client-01", "client-02"]
    assert clients == load(path, cut)
    # ten rows of a source each, as by the column itself; questions are the same in all sources
    everyone = [sorted(questions(c.train + c.evaluation)) for c in clients.values()]
    assert everyone == [sorted(f"q{n}?" for n in range(10))] * 3


def test_a_class_of_flwr_datasets_may_cut_by_length(tmp_path):
    rows = [{"question": "q" * (1 + 7 * n % 20), "answer": "a", "num": n} for n in range(20)]
    cut = foreign("ContinuousPartitioner", 4, partition_by="num_characters", strictness=1.0)
    clients = load(write(tmp_path / "a.jsonl", rows), cut)
    found = [n for c in clients.values() for n in sorted(map(characters, c.train + c.evaluation))]
    assert found == list(range(2, 22))
    # a column of that name is the user's own
    rows = [{**row, "num_characters": row["num"]} for row in rows]
    own = load(write(tmp_path / "b.jsonl", rows), cut)
    assert [len(c.train) + len(c.evaluation) for c in own.values()] == [5, 5, 5, 5]
    first = sorted(questions(own["client-00"].train + own["client-00"].evaluation), key=len)
    assert first == sorted((row["question"] for row in rows[:5]), key=len)


def test_rows_that_a_class_leaves_to_no_one_are_counted(tmp_path):
    path = write(tmp_path / "data.jsonl", make_rows(23))

    def num_unused(cut, *, server_fraction=0.0, **settings):
        cfg = DataConfig(path=str(path), **settings)
        _, warnings = cut_clients(cfg, cut, seed=17, server_fraction=server_fraction)
        return sum(
            int(re.findall(r"assigns (\d+) rows? to no client", text)[0]) for text in warnings
        )

    shards = foreign("ShardPartitioner", 5, partition_by="source", num_shards_per_partition=1)
    assert num_unused(shards) == 3
    assert num_unused(shards, max_rows=1, max_eval_rows=1) == 3, "a maximum was asked for"
    rows = load_server_rows(
        DataConfig(path=str(path)), seed=17, task="instruct", fraction=0.1, path=None
    )
    rest = (23 - len(rows)) % 5
    assert num_unused(shards, server_fraction=0.1) == rest, "the server's rows are used"
    assert num_unused(foreign("IidPartitioner", 5)) == 0
    assert num_unused(PartitionConfig(kind="iid", num_clients=5), max_rows=1) == 0


def test_rows_that_are_not_wanted_are_not_counted_as_unused(tmp_path):
    path = write(tmp_path / "data.jsonl", make_rows(6) + make_rows(6, "south"))
    cut = PartitionConfig(by="source", only=("north",))
    assert cut_clients(DataConfig(path=str(path)), cut, seed=17)[1] == []


def test_rows_without_a_text_may_be_left_out_and_are_counted(tmp_path):
    rows = [*make_rows(6), {"source": "north", "question": "Why?", "answer": " "}]
    path = write(tmp_path / "data.jsonl", [*rows, *make_rows(6, "south")])
    kept = DataConfig(path=str(path), skip_empty=True)
    clients, warnings = cut_clients(kept, PartitionConfig(by="source"), seed=17)
    assert warnings == ["data.skip_empty: 1 row lacks a text and is not used"]
    whole = load(write(tmp_path / "whole.jsonl", make_rows(6) + make_rows(6, "south")), BY_SOURCE)
    assert clients == whole
    with pytest.raises(DataError, match=r"data.jsonl:7: column 'answer' is empty"):
        load(path, BY_SOURCE)


def test_leaving_rows_out_hides_no_other_mistake(tmp_path):
    path = write(tmp_path / "data.jsonl", [*make_rows(4), {"source": "north", "question": ["a"]}])
    cfg = DataConfig(path=str(path), skip_empty=True)
    with pytest.raises(DataError, match=r"data.jsonl:5: column 'question' has the type list"):
        load_clients(cfg, PartitionConfig(by="source"), seed=17)


def test_a_client_whose_rows_all_lack_a_text_is_named(tmp_path):
    write(tmp_path / "rows" / "north.jsonl", make_rows(4))
    write(tmp_path / "rows" / "south.jsonl", [{"question": "Why?", "answer": ""}] * 3)
    cfg = DataConfig(path=str(tmp_path / "rows"), skip_empty=True)
    with pytest.raises(DataError, match="every row of client 'south' lacks a text"):
        load_clients(cfg, None, seed=17)


def test_rows_of_no_one_are_a_warning_before_a_run(tmp_path, tiny_model):
    rows = write(tmp_path / "data.jsonl", make_rows(23))
    shards = foreign("ShardPartitioner", 5, partition_by="source", num_shards_per_partition=1)
    recipe = {
        "rounds": 1,
        "model": {"name": str(tiny_model)},
        "data": {"path": str(rows)},
        "partition": shards.model_dump(exclude_unset=True),
    }
    warning = (
        "partition.partitioner: 'ShardPartitioner' assigns 3 rows to no client; change "
        "[partition.options] if you need them"
    )
    assert silotune.check(parse(recipe)).warnings == [warning]
    assert silotune.preview(parse(recipe)).warnings == [warning]
    recipe["partition"] = {"kind": "iid", "num_clients": 5}
    assert silotune.check(parse(recipe)).warnings == []


def test_options_of_a_class_are_checked_before_anything_is_read():
    cut = foreign("ShardPartitioner", 3, shard_sise=3)
    text = error_of(load, "/no/such/file.csv", cut, kind=ConfigError)
    assert "has no option 'shard_sise'. Did you mean 'shard_size'?" in text


def test_a_class_of_flwr_datasets_cannot_cut_two_parts_alike(tmp_path):
    train = write(tmp_path / "a.jsonl", make_rows(10))
    held = write(tmp_path / "b.jsonl", make_rows(5))
    cut = foreign("IidPartitioner", 2)
    assert error_of(load, train, cut, kind=ConfigError, eval_path=str(held)) == (
        'partition.kind = "flwr-datasets" cannot be used when the held-out rows are stored '
        "separately: train and held-out rows would be partitioned independently, so a client "
        "could get different kinds of rows in each.\n"
        "  Remove data.eval_path or data.eval_split, or set data.path to the train file alone; "
        "each client then holds out some of its own rows."
    )
    assert "are stored separately" in error_of(load, "medquad_mini", cut, kind=ConfigError)


def test_one_data_set_without_a_partition_lists_candidate_columns(tmp_path):
    rows = [{**row, "id": n, "all": "x"} for n, row in enumerate(make_rows(4))]
    rows += [{**row, "source": "south"} for row in rows]
    path = write(tmp_path / "data.jsonl", [{**row, "id": n} for n, row in enumerate(rows)])
    text = error_of(load, path)
    assert text == (
        f"'{path}' is one data set, and the recipe does not say how to split it into clients.\n"
        "  Set [partition] by = \"a column\" (candidates: 'source', 'question', 'answer'), "
        'or kind = "iid" with num_clients,\n'
        "  or set data.path to a folder with one file per client."
    )


def test_no_candidate_columns_are_no_brackets(tmp_path):
    path = write(tmp_path / "data.jsonl", make_rows(4))
    assert 'by = "a column", or kind = "iid"' in error_of(load, path, PartitionConfig())


@pytest.mark.parametrize(
    ("cut", "setting"),
    [
        (PartitionConfig(by="sourc"), "partition.by"),
        (
            PartitionConfig(kind="dirichlet", num_clients=2, alpha=1, label="sourc"),
            "partition.label",
        ),
        (
            PartitionConfig(
                kind="flwr-datasets",
                partitioner="NaturalIdPartitioner",
                options={"partition_by": "sourc"},
            ),
            "partition.options.partition_by",
        ),
    ],
)
def test_a_missing_partition_column_offers_the_nearest(tmp_path, cut, setting):
    path = write(tmp_path / "data.jsonl", make_rows(4))
    assert error_of(load, path, cut) == (
        f"{setting} = 'sourc': {path}:1 and the rows after it have no such column. "
        "Did you mean 'source'?\n  The columns are 'source', 'question', 'answer'."
    )


@pytest.mark.parametrize("value", [None, "", " "])
def test_an_empty_client_name_is_named_by_its_line(tmp_path, value):
    path = write(tmp_path / "data.jsonl", make_rows(3) + make_rows(1, value))
    text = error_of(load, path, BY_SOURCE)
    assert f"{path}:4: column 'source' is empty, or not a single value." in text


def test_a_client_without_held_out_rows_is_named(tmp_path):
    train = write(tmp_path / "a.jsonl", make_rows(3) + make_rows(3, "south"))
    held = write(tmp_path / "b.jsonl", make_rows(3))
    text = error_of(load, train, BY_SOURCE, eval_path=str(held))
    assert "client 'south' has train rows, but no held-out rows." in text


def test_a_client_that_is_only_held_out_is_named(tmp_path):
    train = write(tmp_path / "a.jsonl", make_rows(3))
    held = write(tmp_path / "b.jsonl", make_rows(3) + make_rows(1, "south") + make_rows(1, "west"))
    text = error_of(load, train, BY_SOURCE, eval_path=str(held))
    assert "client 'south' has held-out rows, but no train rows (2 clients lack them)." in text


def test_max_rows_bounds_the_train_part_alone_and_nests(tmp_path):
    path = write(tmp_path / "data.jsonl", make_rows(50))
    full = load(path, BY_SOURCE)["north"]
    five = load(path, BY_SOURCE, max_rows=5)["north"]
    nine = load(path, BY_SOURCE, max_rows=9)["north"]
    assert (len(five.train), len(nine.train)) == (5, 9)
    assert set(questions(five.train)) < set(questions(nine.train)) < set(questions(full.train))
    assert questions(nine.train) == [q for q in questions(full.train) if q in questions(nine.train)]
    assert five.evaluation == full.evaluation
    assert load(path, BY_SOURCE, max_rows=1000)["north"] == full


def test_own_columns_and_a_system_text_reach_the_rows(tmp_path):
    path = write(tmp_path / "data.csv", [{"t": f"t{n}", "r": f"r{n}", "s": "a"} for n in range(4)])
    clients = load(
        path, PartitionConfig(by="s"), prompt="Q: {t}", completion="{r}", system="Be brief."
    )
    first = clients["a"].train[0]
    assert [m["role"] for m in first] == ["system", "user", "assistant"]
    assert first[0]["content"] == "Be brief."
    assert first[1]["content"].startswith("Q: t")


def test_a_real_client_gets_the_split_of_its_simulation(tmp_path):
    both = write(tmp_path / "both.jsonl", make_rows(20) + make_rows(20, "south"))
    alone = write(tmp_path / "alone.jsonl", make_rows(20, "south"))
    client = load_client(DataConfig(path=str(alone)), "south", seed=17)
    assert client == load(both, BY_SOURCE)["south"]


# --- fingerprint ---


def client_rows(name, *texts):
    talks = tuple(({"role": "assistant", "content": text},) for text in texts)
    return ClientRows(name, talks[:-1], talks[-1:])


def test_the_fingerprint_sees_order_texts_and_parts_but_not_the_order_of_clients():
    a, b = client_rows("a", "1", "2", "3"), client_rows("b", "4", "5")
    whole = fingerprint({"a": a, "b": b})
    assert whole == fingerprint({"b": b, "a": a})
    others = [
        {"a": a},
        {"a": client_rows("a", "2", "1", "3"), "b": b},
        {"a": client_rows("a", "1", "2", "x"), "b": b},
        {"a": ClientRows("a", a.train[:1], a.train[1:] + a.evaluation), "b": b},
    ]
    assert len({whole, *map(fingerprint, others)}) == 5


def test_the_fingerprint_of_the_example_is_a_contract():
    # It is saved in run folders. This is the slow and obvious way, from the raw files.
    digest = hashlib.sha256()
    parts = [
        [json.loads(line) for line in (EXAMPLES["medquad_mini"] / part).read_bytes().splitlines()]
        for part in ("train.jsonl", "eval.jsonl")
    ]
    for name in ["CancerGov", "GARD", "GHR", "NIDDK", "NINDS"]:
        talks = [
            [
                [
                    {"content": row["question"], "role": "user"},
                    {"content": row["answer"], "role": "assistant"},
                ]
                for row in part
                if row["source"] == name
            ]
            for part in parts
        ]
        digest.update(json.dumps([name, *talks]).encode())
    assert fingerprint(load("medquad_mini", BY_SOURCE)) == digest.hexdigest()


# --- config ---


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"eval_path": "b", "eval_fraction": 0.5}, "give eval_path or eval_fraction, not both"),
        ({"eval_path": "a"}, "eval_path is the same as path"),
        ({"eval_path": "b", "eval_split": "t"}, "give eval_path or eval_split, not both"),
        ({"eval_split": "t", "eval_fraction": 0.5}, "give eval_split or eval_fraction, not both"),
        (
            {"eval_path": "b", "eval_split": "t", "eval_fraction": 0.5},
            "give eval_path or eval_split or eval_fraction, not all",
        ),
        ({"eval_split": "train"}, "eval_split shares rows with split"),
        ({"eval_split": "train[:9]"}, "eval_split shares rows with split"),
        ({"split": "test[:9]", "eval_split": "test"}, "eval_split shares rows with split"),
        ({"prompt": "{x}"}, "prompt and completion belong together; set both"),
        ({"completion": "{x}"}, "prompt and completion belong together; set both"),
        ({"prompt": "{x.y}", "completion": "{x}"}, "prompt has a placeholder that is not a plain"),
        ({"prompt": "{x}", "completion": "{x"}, "completion has a single brace"),
        ({"prompt": "{x}", "completion": "yes"}, "every row would teach the same answer"),
        ({"eval_fraction": 1.0}, "less than 1"),
        ({"eval_fraction": 0.0}, "greater than 0"),
        ({"max_rows": 0}, "greater than or equal to 1"),
        ({"system": ""}, "at least 1 character"),
        ({"pat": "a"}, "Extra inputs are not permitted"),
    ],
)
def test_contradictions_are_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        DataConfig(**{"path": "a", **settings})


def test_a_resolved_config_can_be_read_again():
    for held_out in ({"eval_path": "b"}, {"eval_split": "test"}):
        cfg = DataConfig(path="a", **held_out)
        assert DataConfig(**cfg.model_dump()) == cfg


def test_two_slices_of_one_split_are_fine():
    assert DataConfig(path="a", split="train[:90%]", eval_split="train[90%:]")


def test_every_field_explains_itself():
    assert all(field.description for field in DataConfig.model_fields.values())


def test_places_are_drawn_only_for_what_is_split_or_cut(tmp_path, monkeypatch):
    """Each is a hash for every row: with 50,000 rows, four of five were for nothing."""
    drawn, real = [], assembling.places

    def places(digests, seed, purpose):
        drawn.append(purpose)
        return real(digests, seed, purpose)

    monkeypatch.setattr(assembling, "places", places)
    path = write(tmp_path / "rows.jsonl", make_rows(8))
    load(path, BY_SOURCE)
    assert drawn == ["held-out"]
    drawn.clear()
    load(path, BY_SOURCE, validation_fraction=0.5, max_rows=2, max_eval_rows=1)
    assert drawn == ["held-out", "validation", "max-eval-rows", "max-rows", "max-eval-rows"]
