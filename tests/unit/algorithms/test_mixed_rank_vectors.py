"""Printed vectors: two clients with weights 3 and 1 and ranks 2 and 1, both signs.

The numbers come from mixed_rank_vectors.py beside this file, which knows no code of silotune.
"""

import pytest
import torch

from silotune.algorithms.fedex import FedExConfig, fedex
from silotune.algorithms.flexlora import FlexLoRAConfig, flexlora
from silotune.algorithms.flora import FLoRAConfig, flora
from silotune.algorithms.hetlora import HetLoRAConfig, hetlora
from silotune.core.lora import at_rank, joined
from silotune.core.types import ServerState, Update

A, B = "lora_A", "lora_B"
FLORA = [0.25, -0.75, 0.25, -1.0, 3.0, 0.5, 1.875, 2.625, 0.75]
FLEX_1 = [-0.0935531745, -0.6195903561, -0.1285450011, 0.4182989403, 2.7703388014, 0.5747558864]
FLEX_1 += [0.4340192992, 2.8744526681, 0.5963561534]
FLEX_2 = [0.2985680841, -0.6879855038, -0.0842586786, -0.9877877401, 3.015593309, 0.4159519276]
FLEX_2 += [1.873698959, 2.6233387567, 0.758954116]
HET_B = [-0.0825697102, 0.0, -0.3761454346, 0.4587151449, 1.8532121378, 0.9174302898]
HET_A = [1.5412848551, -0.4587151449, -0.5412848551, 0.0, 0.9174302898, 0.4587151449]
FEDEX_MEAN = [0.625, -0.375, -0.125, -1.5625, 2.0625, 0.875, 1.40625, 1.40625, 0.84375]
FEDEX_RESIDUAL = [-0.375, -0.375, 0.375, 0.5625, 0.9375, -0.375, 0.46875, 1.21875, -0.09375]


def wide(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# as in mixed_rank_vectors.py
FIRST = {B: wide((1, 0), (-2, 1), (0.5, 2)), A: wide((1, -1, 0), (0, 2, 1))}
SECOND = {B: wide((-1,), (1,), (3,)), A: wide((2, 0, -1))}
PADDED = {B: wide((-1, 0), (1, 0), (3, 0)), A: wide((2, 0, -1), (0, 0, 0))}


def play(algorithm, second=SECOND):
    """From a server at 0, so that deltas are the clients' own factors."""
    state = ServerState(0, {n: torch.zeros_like(t) for n, t in FIRST.items()})
    updates = [Update("c0", 1, FIRST, 3, {}), Update("c1", 1, second, 1, {})]
    return algorithm.step(state, algorithm.combine(state, updates)).adapter


def product(adapter):
    return (adapter[B] @ adapter[A]).flatten().tolist()


def test_flora_gives_the_printed_mean_of_products():
    assert product(joined(play(flora(FLoRAConfig())))) == pytest.approx(FLORA, abs=1e-9)


def test_flexlora_gives_the_printed_products_of_each_rank():
    after = play(flexlora(FlexLoRAConfig()))
    assert product(after) == pytest.approx(FLEX_2, abs=1e-9)
    assert product(at_rank(after, 1)) == pytest.approx(FLEX_1, abs=1e-9)


def test_hetlora_gives_the_printed_factors():
    after = play(hetlora(HetLoRAConfig(weights="uniform")))
    assert after[B].flatten().tolist() == pytest.approx(HET_B, abs=1e-9)
    assert after[A].flatten().tolist() == pytest.approx(HET_A, abs=1e-9)


def test_fedex_gives_the_printed_mean_and_residual():
    after = play(fedex(FedExConfig()), PADDED)
    assert product(after) == pytest.approx(FEDEX_MEAN, abs=1e-9)
    whole = product(joined(after))
    residual = [w - m for w, m in zip(whole, FEDEX_MEAN, strict=True)]
    assert residual == pytest.approx(FEDEX_RESIDUAL, abs=1e-9)
    assert after["residual_B"].shape[1] == 2  # of rank (clients - 1) r, not clients r
