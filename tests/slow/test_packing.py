"""Packing on a real model in half precision, where rounding is large."""

import pytest

from silotune.federation.recipe_model import load_for
from silotune.recipes.parse import load_recipe

pytestmark = pytest.mark.slow


def test_a_real_model_in_bfloat16_is_not_refused_for_its_rounding():
    """Regression: packed and padded rows differ by a tenth of the largest logit, by rounding."""
    load_for(load_recipe("hospitals", ["model.dtype=bfloat16", "train.packing=true"]))
