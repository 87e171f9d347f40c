"""A share of a client's own steps: the ends are exact, and the lowest loss chooses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.federation.own_steps import best_share, interpolated

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5)


def states(values):
    start, own = zip(*values, strict=True)
    return {"w": torch.tensor(start)}, {"w": torch.tensor(own)}


@given(pairs)
def test_the_ends_are_the_two_adapters_bit_for_bit(values):
    """Also for -0.0, and where the difference of the two is not a float32."""
    start, own = states(values)
    for share, wanted in ((0.0, start), (1.0, own), (0, start), (1, own)):
        found = interpolated(start, own, share)["w"]
        assert torch.equal(found.view(torch.int32), wanted["w"].view(torch.int32))


@given(pairs, st.floats(0, 1))
def test_between_the_ends_every_number_lies_between_the_two(values, share):
    start, own = states(values)
    found = interpolated(start, own, share)["w"].double()
    low, high = torch.minimum(start["w"], own["w"]), torch.maximum(start["w"], own["w"])
    room = 1e-5 * (start["w"].abs().double() + own["w"].abs().double()) + 1e-30
    assert bool((found >= low.double() - room).all())
    assert bool((found <= high.double() + room).all())


def test_lora_factors_are_interpolated_and_not_their_product():
    """As the docstring says: (1-a)^2 BA + a^2 B'A' + a(1-a) (BA' + B'A)."""
    gen, a = torch.Generator().manual_seed(0), 0.25
    start, own = (
        {"A": torch.randn(2, 5, generator=gen), "B": torch.randn(4, 2, generator=gen)}
        for _ in range(2)
    )
    found = interpolated(start, own, a)
    product = found["B"] @ found["A"]
    (one, two), (cross, other) = (
        (start["B"] @ start["A"], own["B"] @ own["A"]),
        (start["B"] @ own["A"], own["B"] @ start["A"]),
    )
    expected = (1 - a) ** 2 * one + a**2 * two + a * (1 - a) * (cross + other)
    torch.testing.assert_close(product, expected)
    assert torch.linalg.matrix_rank(product) == 2


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({0.0: 3.0, 0.5: 1.0, 1.0: 2.0}, 0.5),
        ({1.0: 2.0, 0.0: 2.0}, 0.0),  # in doubt, what all clients share
        ({0.0: math.nan, 1.0: 5.0}, 1.0),
        ({0.5: 4.0}, 0.5),
    ],
)
def test_the_share_with_the_lowest_loss_is_chosen(losses, chosen):
    assert best_share(tuple(losses), losses.__getitem__) == (chosen, losses[chosen])
