from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.errors import DataError
from silotune.partition import (
    PartitionConfig,
    by_column,
    client_names,
    dirichlet,
    iid,
    names_in_column,
)
from silotune.seeds import generator

seeds = st.integers(0, 2**31)
label_lists = st.lists(st.sampled_from("abcd"), min_size=1, max_size=60)


def check_every_row_once(shares, num_rows):
    assert sorted(row for rows in shares.values() for row in rows) == list(range(num_rows))
    assert list(shares) == sorted(shares)
    assert all(rows == sorted(rows) for rows in shares.values())
    assert all(shares.values()), "a client is empty"


# --- iid ---


@given(seeds, st.integers(1, 300), st.data())
def test_iid_uses_every_row_once_in_parts_of_equal_size(seed, num_rows, data):
    num_clients = data.draw(st.integers(1, num_rows))
    shares = iid(num_rows, num_clients, generator(seed))
    check_every_row_once(shares, num_rows)
    sizes = [len(rows) for rows in shares.values()]
    assert len(sizes) == num_clients
    assert max(sizes) - min(sizes) <= 1


@given(seeds)
def test_iid_depends_on_the_generator_alone(seed):
    assert iid(20, 3, generator(seed)) == iid(20, 3, generator(seed))


def test_iid_shuffles():
    assert iid(40, 2, generator(1)) != iid(40, 2, generator(2))
    assert iid(40, 2, generator(1))["client-00"] != list(range(20))


@given(st.integers(1, 1200))
def test_client_names_sort_by_number(num_clients):
    names = client_names(num_clients)
    assert names == sorted(names)
    assert len(set(names)) == num_clients


def test_client_names_are_padded_as_far_as_needed():
    assert client_names(2) == ["client-00", "client-01"]
    assert client_names(101)[-1] == "client-100"
    assert client_names(101)[0] == "client-000"


def test_more_clients_than_rows_are_refused():
    with pytest.raises(DataError) as caught:
        iid(3, 4, generator(0))
    assert str(caught.value) == (
        "3 rows cannot be cut into 4 clients of at least 1 each.\n"
        "  Set partition.num_clients to 3 or less, or bring more rows."
    )


# --- dirichlet ---


@given(seeds, label_lists, st.floats(1e-6, 1e6), st.data())
def test_dirichlet_uses_every_row_once_and_leaves_no_client_empty(seed, labels, alpha, data):
    at_least = data.draw(st.integers(1, len(labels)))
    num_clients = data.draw(st.integers(1, len(labels) // at_least))
    shares = dirichlet(labels, num_clients, alpha, generator(seed), at_least=at_least)
    check_every_row_once(shares, len(labels))
    assert len(shares) == num_clients
    assert min(len(rows) for rows in shares.values()) >= at_least


@given(seeds, label_lists)
def test_dirichlet_depends_on_the_generator_alone(seed, labels):
    first = dirichlet(labels, 1, 0.5, generator(seed))
    assert first == dirichlet(labels, 1, 0.5, generator(seed))


def label_shares(labels, shares):
    return [Counter(labels[row] for row in rows) for rows in shares.values()]


@settings(max_examples=10)
@given(seeds)
def test_a_small_alpha_gives_each_label_to_nearly_one_client(seed):
    labels = ["a"] * 500 + ["b"] * 500
    counts = label_shares(labels, dirichlet(labels, 5, 1e-4, generator(seed)))
    # the remembered trap: torch._sample_dirichlet underflows here and shares out evenly
    assert all(max(count[label] for count in counts) >= 495 for label in "ab")


@settings(max_examples=10)
@given(seeds)
def test_a_large_alpha_is_nearly_even(seed):
    labels = ["a"] * 500 + ["b"] * 500
    counts = label_shares(labels, dirichlet(labels, 5, 1e5, generator(seed)))
    assert all(95 <= count[label] <= 105 for count in counts for label in "ab")


def test_proportions_have_the_mean_and_variance_of_a_dirichlet():
    # Dirichlet(alpha, alpha): mean 1/2, variance 1 / (4 * (2 * alpha + 1))
    labels, alpha = ["a"] * 1000, 0.5
    drawn = [
        len(dirichlet(labels, 2, alpha, generator(s))["client-00"]) / 1000 for s in range(2000)
    ]
    shares = torch.tensor(drawn, dtype=torch.float64)
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / 8, abs=0.01)


def test_two_parts_with_one_generator_seed_get_one_mix_of_labels():
    train, held = ["a"] * 1000 + ["b"] * 1000 + ["c"] * 1000, ["a"] * 100 + ["c"] * 100
    first = label_shares(train, dirichlet(train, 4, 0.5, generator(3), known=held))
    second = label_shares(held, dirichlet(held, 4, 0.5, generator(3), known=train))
    for label in "ac":
        for mine, other in zip(first, second, strict=True):
            assert mine[label] / 1000 == pytest.approx(other[label] / 100, abs=0.015)


def test_an_empty_client_receives_the_last_row_of_the_largest():
    labels = ["a"] * 9
    shares = dirichlet(labels, 3, 1e-6, generator(0))
    assert sorted(len(rows) for rows in shares.values()) == [1, 1, 7]
    assert {row for rows in shares.values() if len(rows) == 1 for row in rows} == {7, 8}


def test_dirichlet_refuses_more_clients_than_rows_can_fill():
    with pytest.raises(DataError, match="5 rows cannot be cut into 3 clients of at least 2 each"):
        dirichlet(["a"] * 5, 3, 1.0, generator(0), at_least=2)


# --- by column ---


@given(st.lists(st.sampled_from(["north", "south", " east "]), min_size=1))
def test_by_column_uses_every_row_once_and_strips_names(values):
    shares = by_column(values, "source")
    check_every_row_once(shares, len(values))
    assert set(shares) == {value.strip() for value in values}


def test_numbers_name_clients_too():
    assert by_column([2, 10, 2], "ward") == {"10": [1], "2": [0, 2]}


@pytest.mark.parametrize("bad", [None, "", "  ", float("nan"), ["a"], {}])
def test_a_value_that_names_no_client_is_placed(bad):
    with pytest.raises(DataError) as caught:
        by_column(["north", bad], "source", ["data.csv:2", "data.csv:3"])
    assert str(caught.value) == (
        "column 'source' is empty, or not a single value, at data.csv:3.\n"
        "  Every row needs a value there: fill it, remove the row, or choose another column."
    )


def test_many_bad_values_are_counted():
    with pytest.raises(DataError, match="at row 1, row 2, row 3, row 4, row 5 and 2 more"):
        names_in_column([None] * 7, "source")


# --- config ---


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"by": "a", "kind": "iid", "num_clients": 2}, "give by or kind, not both"),
        ({"kind": "iid"}, 'kind = "iid" needs num_clients'),
        ({"num_clients": 2}, "num_clients needs a kind"),
        ({"by": "a", "num_clients": 2}, "num_clients needs a kind"),
        ({"kind": "dirichlet", "num_clients": 2, "alpha": 1}, "needs alpha and label"),
        ({"kind": "dirichlet", "num_clients": 2, "label": "a"}, "needs alpha and label"),
        ({"kind": "iid", "num_clients": 2, "alpha": 1}, "alpha and label belong to"),
        ({"by": "a", "label": "b"}, "alpha and label belong to"),
        ({"kind": "dirichlet", "num_clients": 2, "alpha": 0, "label": "a"}, "greater than"),
        ({"kind": "iid", "num_clients": 0}, "greater than"),
        ({"kind": "natural"}, "'iid' or 'dirichlet'"),
    ],
)
def test_contradictions_are_refused(fields, text):
    with pytest.raises(ValidationError, match=text):
        PartitionConfig(**fields)


def test_all_contradictions_are_reported_together():
    with pytest.raises(ValidationError) as caught:
        PartitionConfig(by="a", kind="dirichlet")
    for text in ("not both", "needs num_clients", "needs alpha and label"):
        assert text in str(caught.value)


def test_complete_settings_are_accepted():
    PartitionConfig(by="source")
    PartitionConfig(kind="iid", num_clients=1)
    PartitionConfig(kind="dirichlet", num_clients=2, alpha=0.1, label="qtype")
