"""Partitions by classes of flwr-datasets, which are also the oracles for our own partitions."""

import builtins
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError, DataError
from silotune.core.seeds import generator
from silotune.data.flwr_partition import UNFIT, by_partitioner, partitioner_of
from silotune.data.partition import PartitionConfig, by_column, by_length, dirichlet, iid
from tests.unit.data.shares import check_every_row_once, label_shares, sizes_of


def foreign(partitioner, num_clients=None, **options):
    return PartitionConfig(
        kind="flwr-datasets", partitioner=partitioner, num_clients=num_clients, options=options
    )


@given(st.integers(1, 60), st.data())
def test_our_iid_has_the_sizes_of_theirs(num_rows, data):
    num_clients = data.draw(st.integers(1, num_rows))
    theirs = by_partitioner(foreign("IidPartitioner", num_clients), num_rows, generator(0))
    check_every_row_once(theirs, num_rows)
    ours = iid(num_rows, num_clients, generator(0))
    assert sorted(sizes_of(ours)) == sorted(sizes_of(theirs))


@given(st.lists(st.sampled_from(["north", " south ", "east"]), min_size=1))
def test_our_groups_by_column_are_theirs(values):
    cfg = foreign("NaturalIdPartitioner", partition_by="ward")
    theirs = by_partitioner(cfg, len(values), generator(0), values=values)
    assert list(theirs.values()) == list(by_column(values, "ward").values())


def unevenness(labels, shares):
    """Mean over clients of the distance between a client's mix of labels and that of all rows."""
    whole = Counter(labels)
    return sum(
        sum(abs(own[k] / sum(own.values()) - whole[k] / len(labels)) for k in whole) / 2
        for own in label_shares(labels, shares)
    ) / len(shares)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_our_dirichlet_is_as_uneven_as_theirs(alpha):
    labels = list("abcde") * 100
    cfg = foreign("DirichletPartitioner", 5, partition_by="x", alpha=alpha, min_partition_size=0)
    ours, theirs = [], []
    for seed in range(30):
        ours.append(unevenness(labels, dirichlet(labels, 5, alpha, generator(seed))))
        cut = by_partitioner(cfg, len(labels), generator(seed), values=labels, at_least=0)
        theirs.append(unevenness(labels, {n: rows for n, rows in cut.items() if rows}))
    assert sum(ours) / 30 == pytest.approx(sum(theirs) / 30, abs=0.06)


def test_strict_continuous_parts_are_our_parts_by_length():
    lengths = [(7 * n) % 100 for n in range(100)]
    cfg = foreign("ContinuousPartitioner", 4, partition_by="num_characters", strictness=1.0)
    theirs = by_partitioner(cfg, 100, generator(0), values=lengths)
    assert theirs == by_length(lengths, 4, generator(0))[0]


LABELS = list("cab") * 20
CLASSES = {
    "ContinuousPartitioner": (3, {"strictness": 0.5}, [str(n) for n in range(60)]),
    "DirichletPartitioner": (3, {"alpha": 5.0, "min_partition_size": 2}, LABELS),
    "ExponentialPartitioner": (3, {}, None),
    "GroupedNaturalIdPartitioner": (None, {"group_size": 2}, LABELS),
    "IidPartitioner": (3, {}, None),
    "InnerDirichletPartitioner": (None, {"alpha": 1.0, "partition_sizes": [30, 20, 10]}, LABELS),
    "LinearPartitioner": (3, {}, None),
    "NaturalIdPartitioner": (None, {}, LABELS),
    "PathologicalPartitioner": (3, {"num_classes_per_partition": 2}, LABELS),
    "ShardPartitioner": (3, {"num_shards_per_partition": 2}, LABELS),
    "SizePartitioner": (None, {"partition_sizes": [10, 20, 30]}, None),
    "SquarePartitioner": (3, {}, None),
}


def test_every_class_of_the_library_is_tried_or_said_not_to_fit():
    from flwr_datasets import partitioner

    assert set(partitioner.__all__) == set(CLASSES) | set(UNFIT)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_class_uses_each_row_once_and_follows_the_seed(name, seed):
    num_clients, options, values = CLASSES[name]
    if values is not None:
        options = {**options, "partition_by": "a column"}
    cfg = foreign(name, num_clients, **options)
    shares = by_partitioner(cfg, 60, generator(seed), values=values, at_least=2)
    check_every_row_once(shares, 60)
    assert shares == by_partitioner(cfg, 60, generator(seed), values=values, at_least=2)


def test_the_seed_of_the_run_is_used_where_the_options_have_none():
    def cut(run_seed, **options):
        cfg = foreign("ContinuousPartitioner", 3, partition_by="x", strictness=0.2, **options)
        return by_partitioner(cfg, 40, generator(run_seed), values=list(range(40)))

    assert cut(1) != cut(2)
    assert cut(1, seed=7) == cut(2, seed=7)
    assert cut(1, seed=7) != cut(1, seed=8)


def test_labels_that_are_texts_suit_a_class_that_wants_numbers():
    # InnerDirichletPartitioner alone compares labels with 0, 1, ... and would find no row of "a"
    cfg = foreign("InnerDirichletPartitioner", partition_by="x", alpha=1e6, partition_sizes=[8, 4])
    shares = by_partitioner(cfg, 12, generator(0), values=[3, "b"] * 6)
    assert sizes_of(shares) == [8, 4]


def test_rows_that_the_class_leaves_out_go_to_no_one():
    cfg = foreign("ShardPartitioner", 3, partition_by="x", num_shards_per_partition=1)
    assert sizes_of(by_partitioner(cfg, 11, generator(0), values=["a"] * 11)) == [3, 3, 3]


def refusal(cfg, call=partitioner_of, **settings):
    with pytest.raises(ConfigError) as caught:
        call(cfg, **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", UNFIT)
def test_a_class_that_cannot_serve_says_why(name):
    text = refusal(foreign(name, 2))
    head, fix = text.split("\n")
    assert head == f"partition.partitioner: '{name}' {UNFIT[name]}."
    assert fix.startswith("  Choose one of: ContinuousPartitioner, ")
    assert f" {name}," not in fix


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (
            foreign("ShrdPartitioner", 2),
            "partition.partitioner: 'ShrdPartitioner' does not exist. Did you mean "
            "'ShardPartitioner'?\n  Choose one of: ",
        ),
        (
            foreign("ShardPartitioner", 2, shard_sise=3),
            "has no option 'shard_sise'. Did you mean 'shard_size'?\n"
            "  Its options are: num_partitions, ",
        ),
        (
            foreign("ContinuousPartitioner", 2),
            "needs partition_by, strictness.\n  Set partition.options.partition_by, "
            "partition.options.strictness.",
        ),
        (foreign("IidPartitioner"), "needs num_partitions.\n  Set partition.num_clients."),
        (
            foreign("NaturalIdPartitioner", 2, partition_by="a"),
            "determines the number of clients itself.\n  Remove partition.num_clients.",
        ),
    ],
)
def test_options_are_checked_before_rows_are_read(cfg, text):
    assert text in refusal(cfg)


def test_the_number_of_clients_may_stand_in_the_options():
    assert partitioner_of(foreign("IidPartitioner", num_partitions=3))[1] == {"num_partitions": 3}
    assert partitioner_of(foreign("IidPartitioner", 3))[1] == {"num_partitions": 3}


def test_a_missing_library_is_one_command_away(monkeypatch):
    def without(name, *args, _import=builtins.__import__, **kwargs):
        if name.startswith("flwr_datasets"):
            raise ImportError(name)
        return _import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refusal(foreign("IidPartitioner", 2)) == (
        'partition.kind = "flwr-datasets" needs the flwr-datasets library.\n'
        "  Install it: make env EXTRAS=partitioners"
    )


def test_what_the_class_complains_of_is_passed_on():
    cfg = foreign("ShardPartitioner", 2, partition_by="x")
    text = refusal(cfg, by_partitioner, num_rows=9, gen=generator(0), values=["a"] * 9)
    assert text == (
        "partition.partitioner: 'ShardPartitioner' failed on 9 rows: ValueError: The "
        "shard_size needs to be specified if the num_shards_per_partition is None.\n"
        "  Change [partition.options] or partition.num_clients."
    )


def test_a_client_with_too_few_rows_is_named():
    cfg = foreign("LinearPartitioner", 3)
    with pytest.raises(DataError) as caught:
        by_partitioner(cfg, 7, generator(0), at_least=2)
    assert str(caught.value) == (
        "partition.partitioner: 'LinearPartitioner' leaves 'client-00' with 1 of 7 rows, but each "
        "client needs 2.\n"
        "  Change [partition.options], use fewer clients, or add rows."
    )


@pytest.mark.parametrize("bad", ["many", "nan", math.inf])
def test_a_value_that_is_no_number_is_placed(bad):
    cfg = foreign("ContinuousPartitioner", 2, partition_by="age", strictness=1.0)
    with pytest.raises(DataError) as caught:
        by_partitioner(cfg, 3, generator(0), values=[1, 2.5, bad], places=["a:1", "a:2", "a:3"])
    assert str(caught.value) == (
        "column 'age' does not hold a finite number at a:3.\n"
        "  Fix it, remove the row, or choose another column."
    )


def test_a_missing_value_is_placed():
    cfg = foreign("NaturalIdPartitioner", partition_by="ward")
    with pytest.raises(DataError, match="column 'ward' is empty, or not a single value, at row 2"):
        by_partitioner(cfg, 2, generator(0), values=["north", None])
