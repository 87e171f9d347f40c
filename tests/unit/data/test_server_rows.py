"""The server's own rows: no client has them, no row is lost, and a keyed hash decides each."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.data.clients import load_clients
from silotune.data.files import Part, PlacedRow
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from silotune.data.row_draws import places, row_digests
from silotune.data.server_rows import load_server_rows, set_aside_server_rows
from silotune.workflows.data_overview import label_warnings
from tests.unit.data.row_files import SECRET, error_of, make_rows, write

SITES = ("east", "north", "south")
ROWS = [
    {"site": SITES[n % 3], "text": f"text {n}", "label": "no" if n < 30 else "yes"}
    for n in range(60)
]
"""Sorted by label, as public files often are."""
BY_SITE = PartitionConfig(by="site")
CUTS = {
    "by": BY_SITE,
    "iid": PartitionConfig(kind="iid", num_clients=4),
    "dirichlet": PartitionConfig(kind="dirichlet", num_clients=3, alpha=0.3, label="label"),
}


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def texts(rows):
    return [row["text"] for row in rows]


def numbers(rows):
    """Places in the file, from 0."""
    return [int(row["text"].split()[1]) for row in rows]


def server(path, fraction=0.3, *, seed=17, own=None, task="classify", **settings):
    cfg = DataConfig(path=str(path), **settings)
    return load_server_rows(cfg, seed=seed, task=task, fraction=fraction, path=own)


def clients(path, fraction=0.3, *, seed=17, cut=BY_SITE, task="classify", **settings):
    cfg = DataConfig(path=str(path), **settings)
    return load_clients(cfg, cut, seed=seed, task=task, server_fraction=fraction)


def all_texts(found):
    return [text for own in found.values() for text in texts(own.train + own.evaluation)]


# --- nobody shares a row ---


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.75])
def test_server_and_clients_share_no_row_and_together_have_all(path, kind, fraction):
    own, theirs = texts(server(path, fraction)), all_texts(clients(path, fraction, cut=CUTS[kind]))
    assert sorted([*own, *theirs]) == sorted(texts(ROWS))


def test_rows_held_out_elsewhere_are_never_the_servers(tmp_path, path):
    held = write(tmp_path / "held.jsonl", [{**row, "text": f"h{n}"} for n, row in enumerate(ROWS)])
    own = texts(server(path, eval_path=str(held)))
    found = clients(path, eval_path=str(held))
    assert sorted(t for c in found.values() for t in texts(c.evaluation)) == sorted(
        f"h{n}" for n in range(60)
    )
    train = [text for c in found.values() for text in texts(c.train)]
    assert sorted([*own, *train]) == sorted(texts(ROWS))


def test_without_a_share_the_server_has_nothing_and_the_clients_are_as_before(path):
    assert server(path, 0.0) == ()
    plain = load_clients(DataConfig(path=str(path)), BY_SITE, seed=17, task="classify")
    assert clients(path, 0.0) == plain


def test_the_servers_rows_are_not_capped_by_the_clients_limits(path):
    limits = {"max_rows": 2, "max_eval_rows": 1}
    assert server(path, **limits) == server(path)
    assert {len(c.train) for c in clients(path, **limits).values()} == {2}


def test_conversations_can_be_the_servers_too(tmp_path):
    path = write(tmp_path / "talks.jsonl", make_rows(10) + make_rows(10, "south"))
    own = server(path, task="instruct")
    found = clients(path, cut=PartitionConfig(by="source"), task="instruct")
    assert [message["role"] for message in own[0]] == ["user", "assistant"]
    assert len(own) + sum(len(c.train) + len(c.evaluation) for c in found.values()) == 20


# --- the draw ---


def test_the_draw_depends_on_the_seed(path):
    assert server(path, seed=1) == server(path, seed=1)
    assert server(path, seed=1) != server(path, seed=2)


def test_the_order_of_the_file_has_no_say_in_the_draw(tmp_path, path):
    other = write(tmp_path / "turned.jsonl", ROWS[::-1])
    assert server(path) == server(other)[::-1]


@pytest.mark.parametrize("gone", range(0, 60, 7))
def test_a_row_more_or_less_changes_nothing_for_the_others(tmp_path, path, gone):
    """Bug: the share was drawn by the number of rows, so that one row re-drew it."""
    fewer = write(tmp_path / "fewer.jsonl", [row for n, row in enumerate(ROWS) if n != gone])
    kept = [text for text in texts(server(path)) if text != f"text {gone}"]
    assert texts(server(fewer)) == kept


def test_a_file_sorted_by_label_does_not_give_the_server_one_label(path):
    for seed in range(20):
        own = server(path, 0.5, seed=seed)
        places = numbers(own)
        assert any(b - a > 1 for a, b in pairwise(places)), "a contiguous block"
        assert 5 <= [row["label"] for row in own].count("no") <= 25
        assert places == sorted(places), "the order of the file is kept"


def test_every_row_is_drawn_about_equally_often(path):
    counts = [0] * 60
    for seed in range(300):
        for n in numbers(server(path, 0.5, seed=seed)):
            counts[n] += 1
    # 300 draws at one half: 150, and five standard deviations are 43
    assert all(107 <= count <= 193 for count in counts)


def test_the_split_seed_fixes_the_draw_while_the_seed_changes(path):
    assert server(path, seed=1, split_seed=5) == server(path, seed=2, split_seed=5)
    assert server(path, seed=5) == server(path, seed=1, split_seed=5)
    assert clients(path, seed=1, split_seed=5) == clients(path, seed=2, split_seed=5)
    own, theirs = server(path, seed=1, split_seed=5), clients(path, seed=2, split_seed=5)
    assert sorted([*texts(own), *all_texts(theirs)]) == sorted(texts(ROWS))


@given(size=st.integers(1, 40), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 100))
def test_any_share_is_cut_clean_or_refused(size, fraction, seed):
    part = Part([PlacedRow(str(n), {"text": str(n)}) for n in range(size)])
    try:
        rest, own = set_aside_server_rows(part, fraction, DataConfig(path="a"), seed=seed)
    except DataError:
        draw = places(row_digests(part.rows), seed, "server-rows")
        assert sum(place < fraction for place in draw) in (0, size)
        return
    assert own
    assert rest.rows
    assert sorted(int(row.where) for row in [*rest.rows, *own]) == list(range(size))


def test_the_servers_rows_are_about_the_share(tmp_path):
    path = write(tmp_path / "many.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(4000)])
    # 1200 are expected, and five standard deviations are 145
    assert len(server(path, 0.3)) == pytest.approx(1200, abs=145)


# --- refusals ---


def test_a_share_of_files_that_belong_to_clients_is_refused(tmp_path):
    for site in SITES:
        write(tmp_path / "sites" / f"{site}.jsonl", ROWS[:6])
    for load in (server, clients):
        assert error_of(load, tmp_path / "sites", kind=ConfigError) == (
            f"server.data_fraction: '{tmp_path / 'sites'}' holds one file per client, and those "
            "rows belong to the clients.\n  Give the server its own rows: server.data_path."
        )


@pytest.mark.parametrize(("num_rows", "fraction"), [(1, 0.5), (2, 0.01), (2, 0.99), (4, 0.02)])
def test_a_share_that_leaves_somebody_without_rows_is_refused(tmp_path, num_rows, fraction):
    path = write(tmp_path / "tiny.jsonl", ROWS[:num_rows])
    for load in (server, clients):
        assert error_of(load, path, fraction) == (
            f"server.data_fraction = {fraction:g} of {counted(num_rows, 'row')} leaves the server "
            "or the clients without rows.\n  Choose another fraction, or add rows."
        )


def test_the_smallest_data_that_can_be_shared(tmp_path):
    rows = [{**row, "site": "north"} for row in ROWS[:3]]
    path = write(tmp_path / "tiny.jsonl", rows)
    own, found = server(path, 0.4), clients(path, 0.4)
    assert (len(own), len(found["north"].train), len(found["north"].evaluation)) == (1, 1, 1)


def test_a_client_that_the_share_leaves_with_one_row_is_named(tmp_path):
    rows = [{**row, "site": "south" if n in (0, 59) else "north"} for n, row in enumerate(ROWS)]
    path = write(tmp_path / "uneven.jsonl", rows)
    seed = next(s for s in range(100) if len({0, 59} & set(numbers(server(path, seed=s)))) == 1)
    assert "client 'south' has 1 row, but needs at least 2" in error_of(clients, path, seed=seed)


def test_a_client_that_the_share_leaves_without_a_row_is_named(tmp_path):
    """Bug: all rows of a small client became the server's, and nothing said that it was gone."""
    rows = [{**row, "site": "south" if n == 0 else "north"} for n, row in enumerate(ROWS)]
    path = write(tmp_path / "uneven.jsonl", rows)
    seed = next(s for s in range(100) if 0 in numbers(server(path, seed=s)))
    assert error_of(clients, path, seed=seed).startswith(
        "server.data_fraction leaves client 'south' without rows."
    )


def test_a_bad_row_is_found_whoever_owns_it(tmp_path):
    mine = numbers(server(write(tmp_path / "good.jsonl", ROWS)))[0]
    theirs = next(n for n in range(60) if n not in numbers(server(tmp_path / "good.jsonl")))
    for bad, finder, other in ((mine, server, clients), (theirs, clients, server)):
        # a number of blanks with which the row stays with its owner
        for blanks in range(1, 50):
            rows = [
                {**row, "text": " " * blanks if n == bad else row["text"]}
                for n, row in enumerate(ROWS)
            ]
            placed = Part([PlacedRow(str(n), row) for n, row in enumerate(rows)])
            _, own = set_aside_server_rows(placed, 0.3, DataConfig(path="a"), seed=17)
            if (str(bad) in {row.where for row in own}) == (bad == mine):
                break
        path = write(tmp_path / "bad.jsonl", rows)
        assert f"{path}:{bad + 1}: column 'text' is empty." in error_of(finder, path)
        assert other(path)


# --- a file of the server's own ---


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_servers_own_file_is_read_whole_and_in_order(tmp_path, path, ending):
    own = write(tmp_path / "own" / f"own.{ending}", [{**row, "text": row["text"]} for row in ROWS])
    assert texts(server(path, 0.0, own=str(own))) == texts(ROWS)


def test_the_servers_own_folder_may_hold_a_train_and_an_eval_file(tmp_path, path):
    write(tmp_path / "own" / "train.jsonl", ROWS[:4])
    write(tmp_path / "own" / "eval.jsonl", ROWS[4:6])
    assert texts(server(path, 0.0, own=str(tmp_path / "own"))) == texts(ROWS[:6])


def test_the_servers_own_file_is_fine_where_clients_have_files_each(tmp_path):
    write(tmp_path / "sites" / "north.jsonl", ROWS[:6])
    own = write(tmp_path / "own.jsonl", ROWS[6:9])
    assert texts(server(tmp_path / "sites", 0.0, own=str(own))) == texts(ROWS[6:9])


def test_the_servers_own_file_has_the_columns_and_labels_of_the_clients(tmp_path, path):
    rows = [{"body": row["text"], "kind": row["label"]} for row in ROWS]
    own = write(tmp_path / "own.jsonl", rows)
    settings = {"text": "body", "label": "kind"}
    assert texts(server(path, 0.0, own=str(own), **settings)) == texts(ROWS)
    text = error_of(server, path, 0.0, own=str(own), labels=("no", "maybe"), **settings)
    assert f"{own}:31: column 'kind' has the unknown label 'yes'." in text


def test_a_file_that_is_not_there_offers_the_nearest(tmp_path, path):
    text = error_of(server, path, 0.0, own=str(tmp_path / "row.jsonl"))
    assert "row.jsonl: there is no such file or folder. Did you mean 'rows.jsonl'?" in text


def test_a_bad_row_of_the_servers_own_file_is_named_without_its_text(tmp_path, path):
    own = write(tmp_path / "own.jsonl", [ROWS[0], {"text": SECRET, "label": None}])
    assert f"{own}:2: the label column 'label'" in error_of(server, path, 0.0, own=str(own))


# --- what a classifier will find hard ---


def holding(**labels):
    """Clients by name with train rows of these labels."""
    return {
        name: ClientRows(
            name, tuple({"text": "a", "label": own} for own in found), (), tuple(found)
        )
        for name, found in labels.items()
    }


def test_clients_that_have_all_labels_are_no_warning():
    assert label_warnings(holding(north="aab", south="ba"), ("a", "b")) == []


def test_what_clients_lack_is_told_client_by_client_in_the_order_of_the_labels():
    rows = holding(south="bb", north="aac", east="abc")
    assert label_warnings(rows, ("c", "b", "a")) == [
        "client 'north' has no train rows labelled: b",
        "all train rows of client 'south' have the same label: 'b'",
    ]
    assert label_warnings(holding(north="ad"), ("d", "c", "b", "a"))[0] == (
        "client 'north' has no train rows labelled: c, b"
    )


def test_labels_that_no_client_has_are_told_once_more():
    assert label_warnings(holding(north="ab", south="a"), ("a", "b", "c")) == [
        "client 'north' has no train rows labelled: c",
        "all train rows of client 'south' have the same label: 'a'",
        "no client has train rows labelled: c",
    ]


def test_a_label_that_only_the_server_has_is_one_that_no_client_has(tmp_path):
    rows = [{**row, "label": "maybe" if n == 7 else row["label"]} for n, row in enumerate(ROWS)]
    path = write(tmp_path / "rare.jsonl", rows)
    seed = next(s for s in range(100) if 7 in numbers(server(path, seed=s)))
    found = label_warnings(clients(path, seed=seed), ("maybe", "no", "yes"))
    assert found[-1] == "no client has train rows labelled: maybe"
    assert len(found) == 1 + len(SITES)
