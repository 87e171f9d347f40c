"""FedAvg: the mean of the clients' changes, weighted by their number of examples.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
Algorithm 1. arXiv:1602.05629. On LoRA factors this is FedIT: Zhang et al. 2024, arXiv:2305.05644.
Differs from the paper: clients send changes, not weights, and the server may scale the mean by
`server_lr`. On LoRA the factors A and B are averaged separately, so the product of the means is
not the mean of the products.
"""

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from silotune.algorithms.base import AlgorithmConfig, Facts, mean_delta
from silotune.core.algorithm import Algorithm
from silotune.core.tree import add
from silotune.core.types import AdapterState, Change, ServerState, Updates


class FedAvgConfig(AlgorithmConfig):
    """Settings of FedAvg."""

    server_lr: float = Field(default=1.0, gt=0)
    """Factor applied to the mean change. At 1 the server adopts the clients' mean."""
    facts: ClassVar[Facts] = Facts(
        paper='McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from '
        'Decentralized Data", Algorithm 1, arXiv:1602.05629. On LoRA factors it is FedIT: Zhang '
        "et al. 2024, arXiv:2305.05644",
        differs="Clients send changes, not weights; the server may scale the mean by `server_lr`. "
        "The LoRA factors A and B are averaged separately, so the product of the means is not the "
        "mean of the products.",
    )


def move(state: ServerState, delta: AdapterState, *, server_lr: float = 1.0) -> ServerState:
    """`theta + server_lr * delta`; tensors that are not in `delta` stay unchanged."""
    touched = {name: state.adapter[name] for name in delta}
    adapter = {**state.adapter, **add(touched, delta, scale=server_lr)}
    return replace(state, round=state.round + 1, adapter=adapter)


def fedavg(cfg: FedAvgConfig) -> Algorithm:
    """Build FedAvg."""

    def combine(state: ServerState, updates: Updates) -> Change:  # noqa: ARG001 - interface
        return Change(mean_delta(updates, cfg))

    def step(state: ServerState, change: Change) -> ServerState:
        return move(state, change.delta, server_lr=cfg.server_lr)

    return Algorithm(name="fedavg", combine=combine, step=step)
