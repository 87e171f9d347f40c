"""Folders as the hub has them, and folders of one file per client."""

import pytest

from silotune.core.errors import ConfigError
from silotune.data.clients import cut_clients
from silotune.data.files import read_place
from silotune.data.folders import HELD_OUT, layout_of
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from tests.unit.data.row_files import error_of, make_rows, write

BY_SOURCE = PartitionConfig(by="source")


def put(folder, *names, num_rows=2):
    for name in names:
        write(folder / name, make_rows(num_rows, name.split("-")[0]))
    return folder


def names_of(files):
    return [path.name for path in files]


def test_shards_are_one_part_in_their_order(tmp_path):
    shards = [f"train-{n:05}-of-00012.parquet" for n in range(12)]
    put(tmp_path, *reversed(shards), "test-00000-of-00001.parquet")
    layout = layout_of(tmp_path)
    assert names_of(layout.train) == shards
    assert names_of(layout.held_out) == ["test-00000-of-00001.parquet"]
    train, held = read_place(tmp_path)
    assert (len(train.rows), len(held.rows), train.files) == (24, 2, {})
    assert train.rows[2].where.endswith("train-00001-of-00012.parquet, row 1")


def test_shards_with_hashes_and_in_the_subfolder_data_are_found(tmp_path):
    (tmp_path / "README.md").write_text("about")
    put(
        tmp_path / "data",
        "train-00000-of-00002-a1b2c3d4e5f60718.parquet",
        "train-00001-of-00002-0f1e2d3c4b5a6978.parquet",
    )
    assert len(layout_of(tmp_path).train) == 2


@pytest.mark.parametrize("name", HELD_OUT)
def test_every_name_of_a_held_out_part_is_held_out(tmp_path, name):
    layout = layout_of(put(tmp_path, "train.jsonl", f"{name}.jsonl"))
    assert (names_of(layout.held_out), layout.notes) == ([f"{name}.jsonl"], ())


def test_of_two_held_out_parts_one_is_chosen_and_the_other_named(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl", "validation.jsonl", num_rows=4)
    assert names_of(layout_of(tmp_path).held_out) == ["validation.jsonl"]
    (note,) = layout_of(tmp_path).notes
    assert "'validation' is held out, 'test' not used" in note
    assert names_of(layout_of(tmp_path, held_out="test").held_out) == ["test.jsonl"]


def test_the_choice_reaches_the_recipe_and_the_note_the_user(tmp_path):
    for name in ("train", "test", "validation"):
        write(tmp_path / f"{name}.jsonl", make_rows(3 if name == "test" else 2))
    clients, notes = cut_clients(DataConfig(path=str(tmp_path)), BY_SOURCE, seed=1)
    assert len(clients["north"].evaluation) == 2
    assert any("data.eval_split" in note for note in notes)
    cfg = DataConfig(path=str(tmp_path), eval_split="test")
    assert len(cut_clients(cfg, BY_SOURCE, seed=1)[0]["north"].evaluation) == 3


def test_a_part_that_is_not_there_offers_the_nearest(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl")
    text = error_of(layout_of, tmp_path, held_out="tset", kind=ConfigError)
    assert "has no such held-out part. Did you mean 'test'?" in text
    assert "held-out parts: none" in error_of(
        layout_of, put(tmp_path / "x", "north.csv", "south.csv"), held_out="test", kind=ConfigError
    )


@pytest.mark.parametrize(
    "names",
    [
        ["test.jsonl", "validation.jsonl"],
        ["test-00000-of-00001.parquet"],
        ["eval.jsonl"],
        ["north.csv", "south.csv", "dev.csv"],
        ["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"],
        ["train_north.csv", "train_south.csv", "test_north.csv", "test_south.csv"],
    ],
)
def test_what_is_called_like_a_part_never_becomes_a_client(tmp_path, names):
    text = error_of(layout_of, put(tmp_path, *names))
    assert "is called like a held-out part, but there is no train part." in text


@pytest.mark.parametrize(
    "names",
    [
        ["north.csv", "south.jsonl", "west.ndjson"],
        ["val-de-marne.csv", "paris.csv"],
        ["test-station.csv", "harbour.csv"],
        ["train-station.csv", "train-depot.csv"],
        ["evaluationists.csv", "trainers.csv", "testers.csv"],
    ],
)
def test_files_of_clients_stay_clients(tmp_path, names):
    layout = layout_of(put(tmp_path, *names))
    assert sorted(layout.clients) == sorted(name.split(".")[0] for name in names)


def test_a_client_may_have_shards(tmp_path):
    put(tmp_path, "north-00000-of-00002.csv", "north-00001-of-00002.csv", "south.csv")
    train, _ = read_place(tmp_path)
    assert train.files == {"north": [0, 1, 2, 3], "south": [4, 5]}


def test_shards_of_one_name_alone_are_one_data_set(tmp_path):
    put(tmp_path, "data-00000-of-00002.parquet", "data-00001-of-00002.parquet")
    layout = layout_of(tmp_path)
    assert (len(layout.train), layout.clients) == (2, {})


def test_a_missing_shard_is_named(tmp_path):
    put(tmp_path, "train-00000-of-00003.parquet", "train-00002-of-00003.parquet")
    assert "of the 3 shards of 'train', number 1 is missing." in error_of(layout_of, tmp_path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["north.csv", "north.jsonl"], "client"),
        (["train.csv", "train.jsonl"], "part"),
        (["train.csv", "train-00000-of-00001.csv"], "part"),
        (["train-00000-of-00001.csv", "train-00000-of-00002.csv"], "part"),
        (["train.csv", "training.csv"], "part"),
        (["train.csv", "test.csv", "Test.csv"], "part"),
    ],
)
def test_two_files_of_one_name_are_refused(tmp_path, names, what):
    assert f"would be the same {what}." in error_of(layout_of, put(tmp_path, *names))


def test_other_files_beside_train_are_refused(tmp_path):
    text = error_of(layout_of, put(tmp_path, "train.jsonl", "north.jsonl"))
    assert "'north.jsonl' is neither a train nor a held-out part." in text


@pytest.mark.parametrize("names", [["train.jsonl", "test.jsonl"], ["north.jsonl", "south.jsonl"]])
def test_descriptions_of_a_data_set_do_not_get_in_the_way(tmp_path, names):
    for about in ("dataset_info.json", "dataset_infos.json", "state.json"):
        (tmp_path / about).write_text("{}")
    layout = layout_of(put(tmp_path, *names))
    found = [*layout.train, *layout.held_out, *(f for own in layout.clients.values() for f in own)]
    assert sorted(names_of(found)) == sorted(names)


def test_a_client_called_state_is_not_lost(tmp_path):
    assert set(layout_of(put(tmp_path, "state.json", "county.json")).clients) == {"state", "county"}


def test_a_folder_of_held_out_shards_may_be_the_eval_path(tmp_path):
    train = write(tmp_path / "train.csv", make_rows(4))
    for n in range(2):
        write(tmp_path / "held" / f"test-{n:05}-of-00002.csv", make_rows(3))
    cfg = DataConfig(path=str(train), eval_path=str(tmp_path / "held"))
    clients, _ = cut_clients(cfg, BY_SOURCE, seed=1)
    assert (len(clients["north"].train), len(clients["north"].evaluation)) == (4, 6)
