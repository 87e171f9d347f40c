"""The interval of a share, against its closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.stats import wilson


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_share_has_the_interval_of_wilsons_formula(pair):
    k, n = pair
    z, p = 1.959963984540054, k / n  # the 97.5 % quantile of the normal distribution
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    share = wilson(k, n)
    assert share.mean == p
    assert share.low == pytest.approx(max(0.0, centre - half), abs=1e-9)
    assert share.high == pytest.approx(min(1.0, centre + half), abs=1e-9)
