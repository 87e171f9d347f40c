"""All mistakes of all rows come in one error; names that look like one are named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError
from silotune.data.clients import cut_clients, load_client, load_client_quietly
from silotune.data.near_names import near_names
from silotune.data.partition import PartitionConfig
from silotune.data.placed_rows import MOST_SHOWN, Mistake, refuse
from silotune.data.reading import DataConfig
from tests.unit.data.row_files import SECRET, error_of, make_rows, write

BY_SOURCE = PartitionConfig(by="source")


def test_every_kind_of_mistake_is_in_the_first_error(tmp_path):
    path = tmp_path / "rows.csv"
    lines = ["source,question,answer", "north,a,b", "north,c,", ",d,e", "north,f,g,h", "north"]
    path.write_text("\n".join([*lines, 'north,"i" j,k', ",,", f"south,{SECRET},l"]) + "\n")
    cfg = DataConfig(path=str(path))
    assert error_of(cut_clients, cfg, BY_SOURCE, seed=1).splitlines() == [
        f"{path}:3: column 'answer' is empty.",
        f"{path}:4: column 'source' is empty, or not a single value.",
        f"{path}:5: the row has 4 cells, the header has 3.",
        f"{path}:6: column 'question' is empty.",
        f"{path}:7: not valid CSV: a quote is misplaced or not closed.",
        "  Fill it in, remove the row, or skip all such rows: data.skip_empty = true.",
        "  Every row needs a value there: fill it in, remove the row, or choose another column.",
        "  Put quotes around cells that contain commas.",
        "  Double the quotes inside cells, or save the file as .jsonl.",
    ]


def test_mistakes_of_both_parts_and_of_all_clients_are_listed_in_order(tmp_path):
    for name in ("north", "south"):
        path = write(tmp_path / f"{name}.jsonl", make_rows(2))
        with path.open("a") as file:
            file.write('{"x": \n{"question": "a", "answer": ""}\n')
    heads = error_of(cut_clients, DataConfig(path=str(tmp_path)), None, seed=1).splitlines()[:4]
    assert [head.split(": ")[0].rsplit("/")[-1] for head in heads] == [
        "north.jsonl:3",
        "north.jsonl:4",
        "south.jsonl:3",
        "south.jsonl:4",
    ]


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=200))
def test_no_kind_of_mistake_is_hidden_and_none_is_lost_from_the_count(kinds):
    mistakes = [Mistake(n, f"f:{n}: {k} 7.\n  fix {k}") for n, k in enumerate(kinds)]
    with pytest.raises(DataError) as caught:
        refuse(mistakes[::-1])
    lines = str(caught.value).splitlines()
    heads = [line for line in lines if line.startswith("f:")]
    places = [int(head.split(":")[1]) for head in heads]
    assert places == sorted(places)
    assert len(heads) == min(len(kinds), MOST_SHOWN)
    assert {head.split()[1] for head in heads} == set(kinds)
    hidden = len(kinds) - len(heads)
    assert (f"and {hidden} more row" in str(caught.value)) == bool(hidden)
    assert {line for line in lines if line.startswith("  fix")} == {f"  fix {k}" for k in kinds}


def test_a_row_that_cannot_be_read_stops_a_real_client_too(tmp_path):
    path = write(tmp_path / "rows.jsonl", make_rows(4))
    with path.open("a") as file:
        file.write("{\n")
    for load in (load_client, load_client_quietly):
        assert f"{path}:5: not valid JSON" in error_of(
            load, DataConfig(path=str(path)), "north", seed=1
        )


@pytest.mark.parametrize("task", ["instruct", "classify"])
@pytest.mark.parametrize(
    "one",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "a", "text_pair": "b", "label": "0"},
        {"conversations": None, "other": 1},
        {"question": "a"},
        {},
    ],
)
def test_one_row_more_changes_no_other_row_of_a_private_client(tmp_path, task, one):
    """Sparse rows: a column that only one row has must not decide what the others become."""
    rows = [{**row, "text": f"t{n}", "label": n % 2} for n, row in enumerate(make_rows(30))]
    cfg = [
        DataConfig(path=str(write(tmp_path / f"{n}.jsonl", own)))
        for n, own in enumerate([rows, [*rows, one]])
    ]
    before, after = (load_client_quietly(c, "a", seed=3, task=task)[0] for c in cfg)

    def every(own):
        return [json.dumps(row) for row in (*own.train, *own.evaluation)]

    assert len(every(before)) == 30
    assert set(every(before)) <= set(every(after))
    counts = [
        len(o.train) + len(o.evaluation) + o.num_unused + o.num_unused_eval for o in (before, after)
    ]
    assert counts == [30, 31], "every row counts, whatever it holds"


# --- names ---


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["TRUE", "True", "no"], "'TRUE' and 'True'"),
        (["caf\u00e9", "cafe\u0301"], "'cafe\\u0301' and 'caf\u00e9'"),
        (["St. Mary", "St.  Mary"], "'St.  Mary' and 'St. Mary'"),
        (["a\u200f", "A\u200f", "b"], r"'A\u200f' and 'a\u200f'"),
        (["Stra\u00dfe", "STRASSE", "strasse"], "'STRASSE', 'Straße' and 'strasse'"),
        (["x" * 50, "X" * 50], "(a text of 50 characters)"),
    ],
)
def test_names_that_look_like_one_are_both_named(names, shown):
    (warning,) = near_names("labels", names)
    assert shown in warning


def test_names_that_differ_are_no_warning():
    assert not list(near_names("labels", ["0", "1", "north", "south", "01"]))


def test_labels_and_clients_that_look_like_one_are_warnings_of_a_simulation(tmp_path):
    rows = [
        {"source": source, "text": f"{source} {n}", "label": label}
        for source, labels in (("north", ("TRUE", "no")), ("North ", ("True", "no")))
        for n, label in enumerate(labels * 3)
    ]
    cfg = DataConfig(path=str(write(tmp_path / "rows.csv", rows)))
    clients, warnings = cut_clients(cfg, BY_SOURCE, seed=1, task="classify")
    assert set(clients) == {"north", "North"}
    assert [w.split(" differ")[0] for w in warnings] == [
        "clients 'North' and 'north'",
        "labels 'TRUE' and 'True'",
    ]
    listed = cfg.model_copy(update={"labels": ("TRUE", "True", "no")})
    assert len(cut_clients(listed, BY_SOURCE, seed=1, task="classify")[1]) == 1


def test_whole_numbers_stored_as_floats_name_clients_as_in_a_csv(tmp_path):
    rows = [{**row, "source": float(n % 2)} for n, row in enumerate(make_rows(8))]
    path = write(tmp_path / "rows.parquet", rows)
    clients, _ = cut_clients(DataConfig(path=str(path)), BY_SOURCE, seed=1)
    assert list(clients) == ["0", "1"]
    rows = [{**row, "source": n % 2 + 0.5} for n, row in enumerate(make_rows(8))]
    path = write(tmp_path / "halves.parquet", rows)
    assert list(cut_clients(DataConfig(path=str(path)), BY_SOURCE, seed=1)[0]) == ["0.5", "1.5"]
