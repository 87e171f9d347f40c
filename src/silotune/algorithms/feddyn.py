"""FedDyn: each client's loss is tilted so that its own optimum moves to the common one.

Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", Algorithm 1.
arXiv:2111.04263
A client minimises `L_i(theta) - <g_i, theta> + alpha / 2 |theta - received|^2` and then keeps
`g_i <- g_i - alpha D_i`. The server keeps `h <- h - alpha (share asked) mean(D)` and moves to
`theta + mean(D) - h / alpha`. Nothing more travels than with FedAvg. Differs from the paper: the
mean is weighted by examples unless `weights = "uniform"`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts, kept, mean_delta
from silotune.algorithms.fedavg import move
from silotune.core.algorithm import Algorithm, LocalContext, LocalOutcome, LocalRule
from silotune.core.tree import add, scale, squared_distance, zeros_like
from silotune.core.types import AdapterState, Change, ServerState, Updates

OWN, MEAN, CLIENTS = "gradient", "mean_gradient", "clients"


class FedDynConfig(AlgorithmConfig):
    """Settings of FedDyn."""

    alpha: float = Field(default=0.1, gt=0)
    """Strength of the regularisation. The smaller, the further the server steps."""
    facts: ClassVar[Facts] = Facts(
        paper='Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", Algorithm '
        "1, arXiv:2111.04263",
        differs='The mean is weighted by examples unless `weights = "uniform"`.',
        remembers=True,
    )


def feddyn(cfg: FedDynConfig) -> Algorithm:
    """Build FedDyn."""

    def init(adapter: AdapterState, num_clients: int) -> dict[str, AdapterState]:
        number = torch.tensor([num_clients], dtype=torch.int64)
        return {MEAN: zeros_like(adapter), CLIENTS: {"number": number}}

    def pull(now: Mapping[str, Tensor], context: LocalContext) -> Tensor:
        return 0.5 * cfg.alpha * squared_distance(now, context.received)

    def correct(name: str, gradient: Tensor, context: LocalContext) -> Tensor:
        return gradient - kept(context, OWN, name, gradient)

    def finish(
        delta: AdapterState,
        sum_of_steps: float,  # noqa: ARG001 - the signature of `finish`
        context: LocalContext,
    ) -> LocalOutcome:
        new = {n: kept(context, OWN, n, d) - cfg.alpha * d for n, d in delta.items()}
        return LocalOutcome(memory={OWN: new})

    def combine(state: ServerState, updates: Updates) -> Change:
        share = len(updates) / int(state.extra[CLIENTS]["number"])
        mean = mean_delta(updates, cfg)
        return Change(mean, {MEAN: scale(mean, -cfg.alpha * share)})

    def step(state: ServerState, change: Change) -> ServerState:
        old = state.extra[MEAN]
        changed = change.extra.get(MEAN, {})
        new = {**old, **add({name: old[name] for name in changed}, changed)}
        here = {name: new[name] for name in change.delta}
        moved = move(state, add(change.delta, here, scale=-1 / cfg.alpha))
        return replace(moved, extra={**state.extra, MEAN: new})

    return Algorithm(
        name="feddyn",
        combine=combine,
        step=step,
        init=init,
        local=LocalRule(
            penalty=pull, correct=correct, finish=finish, settings={"alpha": cfg.alpha}
        ),
    )
