"""Which clients share a forward pass: the cheapest split, and none that is too large."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.training.tasks.base import Batch
from silotune.training.together import PASS_TOKENS, plan_passes

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 90)), min_size=1, max_size=7)


def batch(num_rows: int, length: int) -> Batch:
    ids = torch.zeros(num_rows, length, dtype=torch.int64)
    return Batch(ids, ids[:, 0], ids[:, 0], ids.numel(), ids == 0)


def cost(passes, given_shapes, most):
    """Of a split of clients into passes; infinite if a joint one is too large."""
    total = 0.0
    for places in passes:
        tokens = sum(given_shapes[k][0] for k in places) * max(given_shapes[k][1] for k in places)
        if tokens > most and len(places) > 1:
            return float("inf")
        total += PASS_TOKENS + tokens
    return total


def every_split(order):
    """All ways to cut a sequence of places into passes."""
    inner = range(1, len(order))
    for cuts in itertools.chain(*(itertools.combinations(inner, n) for n in range(len(order)))):
        ends = [0, *cuts, len(order)]
        yield [order[a:b] for a, b in itertools.pairwise(ends)]


@given(shapes, st.sampled_from([20, 100, 500]))
def test_no_other_split_is_cheaper(sizes, most):
    found = plan_passes({k: batch(*shape) for k, shape in enumerate(sizes)}, most)
    assert sorted(itertools.chain(*found)) == list(range(len(sizes)))
    by_length = sorted(range(len(sizes)), key=lambda k: sizes[k][1])
    least = min(cost(split, sizes, most) for split in every_split(by_length))
    assert cost(found, sizes, most) == least


def test_without_a_limit_all_clients_share_one_pass():
    found = plan_passes({k: batch(9, 400 * (k + 1)) for k in (0, 2, 5)}, None)
    assert found == [[0, 2, 5]]


def test_a_short_row_is_not_padded_to_a_long_one_for_less_than_a_pass_costs():
    near, far = 60 + PASS_TOKENS // 2, 60 + 3 * PASS_TOKENS
    assert plan_passes({0: batch(1, 60), 1: batch(1, near)}, 500) == [[0, 1]]
    assert plan_passes({0: batch(1, 60), 1: batch(1, far)}, 500) == [[0], [1]]
