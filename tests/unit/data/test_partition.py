import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.core.errors import DataError
from silotune.core.seeds import generator
from silotune.data.partition import (
    PartitionConfig,
    by_column,
    by_length,
    client_names,
    dirichlet,
    iid,
    names_in_column,
)
from silotune.data.topics import by_topic
from tests.unit.data.shares import check_every_row_once, label_shares, sizes_of

seeds = st.integers(0, 2**31)
label_lists = st.lists(st.sampled_from("abcd"), min_size=1, max_size=60)


def cut_or_error(call, *args, **settings):
    """What a call returns, or the text of its error."""
    try:
        return call(*args, **settings), ""
    except DataError as error:
        return None, str(error)


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
        "3 rows cannot be split into 4 clients with at least 1 row each.\n"
        "  Set partition.num_clients to 3 or less, or add rows."
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


@settings(max_examples=10)
@given(seeds)
def test_a_small_alpha_gives_each_label_to_nearly_one_client(seed):
    labels = ["a"] * 500 + ["b"] * 500
    counts = label_shares(labels, dirichlet(labels, 5, 1e-6, generator(seed)))
    # the remembered trap: torch._sample_dirichlet underflows here and returns equal proportions.
    # At alpha = 1e-4, three seeds in a thousand rightly divide a label between two clients.
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
    with pytest.raises(
        DataError, match="5 rows cannot be split into 3 clients with at least 2 rows"
    ):
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
        "  Every row needs a value there: fill it in, remove the row, or choose another column."
    )


def test_many_bad_values_are_counted():
    with pytest.raises(DataError, match="at row 1, row 2, row 3, row 4, row 5 and 2 more"):
        names_in_column([None] * 7, "source")


# --- by length ---

length_lists = st.lists(st.integers(0, 12), min_size=1, max_size=60)


def spans(lengths, shares):
    """Shortest and longest row of each client."""
    return [(min(own), max(own)) for own in ([lengths[n] for n in r] for r in shares.values())]


def is_monotone(lengths, shares):
    return all(first[1] <= second[0] for first, second in pairwise(spans(lengths, shares)))


@given(seeds, length_lists, st.data())
def test_by_length_cuts_even_parts_from_short_to_long(seed, lengths, data):
    at_least = data.draw(st.integers(1, len(lengths)))
    num_clients = data.draw(st.integers(1, len(lengths) // at_least))
    shares, held = by_length(lengths, num_clients, generator(seed), at_least=at_least)
    check_every_row_once(shares, len(lengths))
    sizes = [len(rows) for rows in shares.values()]
    assert len(sizes) == num_clients
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= at_least
    assert is_monotone(lengths, shares)
    assert held is None
    again, _ = by_length(lengths, num_clients, generator(seed), at_least=at_least)
    assert again == shares


@given(seeds, length_lists, length_lists, st.integers(1, 5))
def test_held_out_rows_are_cut_by_the_lengths_of_the_train_rows(seed, lengths, held, num_clients):
    num_clients = min(num_clients, len(lengths))
    cut, error = cut_or_error(by_length, lengths, num_clients, generator(seed), held=held)
    if cut is None:
        assert "has train rows, but no held-out rows of the same length" in error
        return
    shares, held_shares = cut
    check_every_row_once(held_shares, len(held))
    assert list(held_shares) == list(shares)
    assert is_monotone(held, held_shares)
    tops = [longest for _, longest in spans(lengths, shares)]
    for n, rows in enumerate(held_shares.values()):
        for length in (held[row] for row in rows):
            assert n == num_clients - 1 or length <= tops[n]
            assert n == 0 or length >= tops[n - 1]


@given(seeds)
def test_rows_held_out_of_the_same_lengths_are_shared_out_as_the_train_rows(seed):
    lengths = [5] * 40 + [6] * 20
    _, held = by_length(lengths, 3, generator(seed), held=[5, 5, 5, 5, 6, 6])
    assert [len(rows) for rows in held.values()] == [2, 2, 2]


def test_rows_of_equal_length_are_not_cut_by_their_order_in_the_file():
    shares, _ = by_length([7] * 40, 2, generator(1))
    assert shares["client-00"] != list(range(20))
    assert shares != by_length([7] * 40, 2, generator(2))[0]


def test_other_seeds_move_rows_of_equal_length_only():
    lengths = [3 * n for n in range(30)]
    assert by_length(lengths, 4, generator(1)) == by_length(lengths, 4, generator(2))


def test_a_client_without_held_out_rows_of_its_length_is_named():
    with pytest.raises(DataError) as caught:
        by_length([1, 2, 3, 4, 5, 6], 3, generator(0), held=[1, 1])
    assert str(caught.value) == (
        "client 'client-01' has train rows, but no held-out rows of the same length "
        "(2 clients lack them).\n"
        "  Use fewer clients, add held-out rows, or remove the held-out part so that each client "
        "holds out some of its own rows."
    )


def test_by_length_refuses_more_clients_than_rows_can_fill():
    with pytest.raises(
        DataError, match="5 rows cannot be split into 3 clients with at least 2 rows"
    ):
        by_length([1] * 5, 3, generator(0), at_least=2)


# --- by topic ---

WORDS = {
    "heart": ["heart", "artery", "valve", "pulse", "aorta", "beat"],
    "skin": ["skin", "rash", "eczema", "itch", "mole", "acne"],
    "bone": ["bone", "joint", "fracture", "spine", "marrow", "knee"],
}


def topic_texts(num_rows, seed=0):
    """Texts of three topics in turn, four words of a topic each, and their topics."""
    gen = generator(seed)
    topics = [list(WORDS)[n % 3] for n in range(num_rows)]
    words = [torch.randperm(6, generator=gen)[:4].tolist() for _ in topics]
    return [
        f"What is {' '.join(WORDS[t][n] for n in w)}?" for t, w in zip(topics, words, strict=True)
    ], topics


@pytest.mark.parametrize("seed", range(5))
def test_each_topic_becomes_a_client_and_held_out_rows_go_to_theirs(seed):
    texts, topics = topic_texts(60)
    held_texts, held_topics = topic_texts(12, seed=1)
    shares, held = by_topic(texts, 3, generator(seed), held=held_texts)
    check_every_row_once(shares, 60)
    check_every_row_once(held, 12)
    for name in shares:
        (topic,) = {topics[row] for row in shares[name]}
        assert {held_topics[row] for row in held[name]} == {topic}
    # numbered by first rows
    assert [rows[0] for rows in shares.values()] == [0, 1, 2]


few_texts = st.lists(st.text("abc ", max_size=9), min_size=1, max_size=20)


@given(seeds, few_texts, st.integers(1, 4), st.integers(1, 2))
def test_by_topic_uses_every_row_once_or_says_why_not(seed, texts, num_clients, at_least):
    cut, error = cut_or_error(by_topic, texts, num_clients, generator(seed), at_least=at_least)
    if cut is None:
        why = ("cannot be split into", "contain no words", "fewer than")
        assert any(text in error for text in why)
        return
    shares, _ = cut
    check_every_row_once(shares, len(texts))
    assert len(shares) == num_clients
    assert min(len(rows) for rows in shares.values()) >= at_least
    assert by_topic(texts, num_clients, generator(seed), at_least=at_least)[0] == shares


def test_other_seeds_may_cluster_otherwise():
    texts, _ = topic_texts(60)
    found = {str(by_topic(texts, 7, generator(seed))) for seed in range(5)}
    assert len(found) > 1


def many_words(num_rows=80):
    """More words than directions are kept."""
    gen = generator(4)
    drawn = torch.randint(0, 400, (num_rows, 9), generator=gen).tolist()
    return [" ".join(f"w{n}" for n in row) for row in drawn]


def test_threads_do_not_move_rows_and_are_as_before_afterwards():
    texts, before = many_words(), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(by_topic(texts, 6, generator(3), held=texts[:40] * 2))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_many_words_in_few_rows_are_enough():
    shares, held = by_topic(many_words(6), 2, generator(3), held=many_words(6))
    check_every_row_once(shares, 6)
    assert held == shares, "a held-out row goes where an equal train row went"


def test_a_topic_with_too_few_rows_receives_the_nearest_that_can_be_spared():
    texts = ["heart pulse"] * 4 + ["heart pulse skin", "skin rash itch mole"]
    assert sizes_of(by_topic(texts, 2, generator(0))[0]) == [5, 1]
    shares, _ = by_topic(texts, 2, generator(0), at_least=2)
    assert shares == {"client-00": [0, 1, 2, 3], "client-01": [4, 5]}
    texts = ["heart"] * 5 + ["skin"] + ["bone"]
    shares, _ = by_topic(texts, 3, generator(0), at_least=2)
    check_every_row_once(shares, 7)
    own = {name: {texts[row] for row in rows} for name, rows in shares.items()}
    assert sorted(map(sorted, own.values())) == [["bone", "heart"], ["heart"], ["heart", "skin"]]


def test_fewer_topics_than_clients_are_counted():
    with pytest.raises(DataError) as caught:
        by_topic(["a b", "b a", "c", "c", "C"], 3, generator(0))
    assert str(caught.value) == (
        "the rows have 2 different topics, fewer than 3 clients.\n"
        "  Set partition.num_clients to 2 or less, or add rows."
    )


def test_texts_without_words_have_no_topics():
    with pytest.raises(DataError, match="the texts of the rows contain no words"):
        by_topic(["?!", "..."], 2, generator(0))


def test_a_client_without_held_out_rows_of_its_topic_is_named():
    texts, _ = topic_texts(30)
    with pytest.raises(
        DataError, match=r"'client-01' .* no held-out rows of the same topic \(2 cl"
    ):
        by_topic(texts, 3, generator(0), held=["What is pulse?"])


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
        ({"kind": "natural"}, "'cluster' or 'flwr-datasets'"),
        ({"kind": "length"}, 'kind = "length" needs num_clients'),
        ({"kind": "cluster"}, 'kind = "cluster" needs num_clients'),
        ({"by": "a", "kind": "length", "num_clients": 2}, "give by or kind, not both"),
        ({"kind": "length", "num_clients": 2, "alpha": 1}, "alpha and label belong to"),
        ({"kind": "cluster", "num_clients": 2, "label": "a"}, "alpha and label belong to"),
        ({"kind": "cluster", "num_clients": 2, "only": ["a"]}, "set by"),
        ({"kind": "flwr-datasets"}, 'kind = "flwr-datasets" needs partitioner'),
        ({"kind": "iid", "num_clients": 2, "partitioner": "X"}, "partitioner and options belong"),
        ({"by": "a", "options": {"x": 1}}, "partitioner and options belong"),
        (
            {
                "kind": "flwr-datasets",
                "partitioner": "X",
                "num_clients": 2,
                "options": {"num_partitions": 2},
            },
            "num_clients and options.num_partitions are the same; give one",
        ),
        ({"options": {"x": None}}, "'x' should be a number, a string, true, false or a list of "),
        ({"options": {"x": ["a"]}}, "'x' should be a number, a string, true, false or a list of "),
        ({"options": {"x": [1, math.inf]}}, "'x' should be finite"),
        ({"options": {"x": math.nan}}, "'x' should be finite"),
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
    PartitionConfig(kind="length", num_clients=2)
    PartitionConfig(kind="cluster", num_clients=2)
    PartitionConfig(kind="flwr-datasets", partitioner="SomePartitioner")


def test_options_keep_their_types():
    given = {"a": 1, "b": 1.0, "c": True, "d": "text", "e": [1, 2], "f": [1, 0.5]}
    cfg = PartitionConfig(kind="flwr-datasets", partitioner="X", options=given)
    assert repr(cfg.options) == repr(given)
    sent = PartitionConfig.model_validate_json(cfg.model_dump_json())  # to Flower's actors
    assert repr(sent.options) == repr(given)
