"""Changes as words: the masked sum is the sum of the plain words, whatever is summed."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.core.types import TensorSpec, Update
from silotune.federation.secure_sum import Numbers, mean_of
from silotune.recipes.parse import parse
from tests.unit.privacy.secure_sum.test_round import Round


def recipe(weights="examples", **sums):
    return parse(
        {
            "rounds": 3,
            "data": {"path": "rows.jsonl"},
            "model": {"name": "tiny"},
            "algorithm": {"weights": weights},
            "secure_sum": {"kind": "masks", "range": 0.5, "min_cohort": 3, **sums},
        }
    )


@given(
    st.integers(3, 9),
    st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3),
    st.sampled_from(["uniform", "examples"]),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_the_masked_sum_is_that_of_the_plain_words_bit_for_bit(num, shapes, weights, data):
    """Any number of clients, shapes and numbers of rows, with changes beyond the range as well."""
    numbers = Numbers(recipe(weights, max_examples=50), num)
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows = data.draw(st.lists(st.integers(1, 50), min_size=num, max_size=num))
    updates = [
        Update(
            f"client-{n}",
            1,
            {f"t{i}": torch.randn(shape, generator=made) / 2 for i, shape in enumerate(shapes)},
            rows[n],
            {},
            {},
        )
        for n in range(num)
    ]
    plain = {u.client: numbers.encode(u)[0] for u in updates}
    one = Round(num, len(plain["client-0"]))
    one.words = plain
    one.advertise()
    one.share()
    one.mask()
    one.answer()
    opened = one.open()
    assert np.array_equal(opened, one.plain(one.names))
    layout = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in updates[0].delta.items()}
    sum_ = numbers.decode(opened, num)
    mean, weight = mean_of(numbers.run, sum_, layout), sum_.weight
    each = rows if weights == "examples" else [1] * num
    assert weight == sum(each)
    for name, tensor in mean.items():
        exact = sum(
            w * u.delta[name].double().clamp(-0.5, 0.5) for w, u in zip(each, updates, strict=True)
        )
        apart = (tensor.double() - exact / weight).abs().max()
        assert apart <= num * numbers.ring.step / weight + 1e-7
