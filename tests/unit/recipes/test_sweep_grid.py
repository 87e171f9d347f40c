"""What a sweep tries, read from texts: values, combinations, ranges, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError
from silotune.recipes.sweep_grid import (
    Axis,
    Range,
    combinations,
    is_swept,
    read_axes,
    split_keys,
    split_values,
)

VALUES = st.sampled_from(["1", "1e-3", "[1, 2]", '"a, b"', "{ x = 1, y = [2, 3] }", "none", "q8"])


@given(st.lists(VALUES, min_size=1, max_size=6))
def test_values_come_out_as_they_were_put_in(values):
    assert split_values(", ".join(values)) == values


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_the_keys_of_a_listed_run_are_split_at_spaces_outside_brackets_and_quotes(values):
    keys = [f"a.b{i}={value}" for i, value in enumerate(values)]
    assert split_keys("  ".join(keys)) == keys


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_every_combination_is_there_once(sizes):
    axes = [Axis(f"k{i}", tuple(map(str, range(size)))) for i, size in enumerate(sizes)]
    found = combinations(axes)
    assert len(found) == len(set(found)) == math.prod(sizes)
    assert all(len(keys) == len(sizes) for keys in found)


def test_one_value_is_not_a_sweep():
    assert not any(map(is_swept, ["a=1", "a=[1,2]", 'a="x,y"', "a={b=1,c=2}", "a=../data"]))
    assert all(map(is_swept, ["a=1,2", "a=x,y", "a=[1],[2]", "a=1..2", "a=1e-5..1e-3,log"]))


def test_a_range_is_whole_only_between_whole_numbers():
    whole, fractional, log = read_axes(["a=2..8", "b=0..1.0", "c=1e-5..1e-3,log"], search=True)
    assert whole.values == Range(2, 8, log=False)
    assert isinstance(whole.values, Range)
    assert whole.values.whole
    assert fractional.values == Range(0, 1.0, log=False)
    assert isinstance(fractional.values, Range)
    assert not fractional.values.whole
    assert log.values == Range(1e-5, 1e-3, log=True)


@pytest.mark.parametrize(
    ("texts", "search", "message"),
    [
        (["a=1,"], False, "a value is empty"),
        (["a=1,2", "a=3,4"], False, "a appears twice"),
        (["a=1,2,1"], False, "a value appears twice"),
        (["a=1..9"], False, "a range needs a search"),
        (["a=9..1"], True, "is not a range"),
        (["a=1..9,lin"], True, "is not a range"),
        (["a=0..9,log"], True, "numbers above 0"),
        (["1,2"], False, "write key=value,value"),
        (["=1,2"], False, "write key=value,value"),
    ],
)
def test_what_cannot_be_swept_is_explained(texts, search, message):
    with pytest.raises(ConfigError, match=message):
        read_axes(texts, search=search)
