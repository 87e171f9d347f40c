"""Fed-SB: a small matrix between two frozen factors is all that clients train and send.

Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance
in (Private) Federated LoRA Fine-Tuning". arXiv:2502.15436. The frozen factors are those of LoRA-SB:
Ponkshe et al. 2024, arXiv:2411.19557.
A module's product is `B R A` with the core R of shape (r, r). B and A are the same at all clients,
so the product of the mean core is the mean of the products, and what a client sends does not depend
on the width of the module.

B and A are the leading singular vectors of what training changes first. Differs from the paper: no
gradient of the full weights is formed. Clients train B in the first round, on LoRA's random A, and
A in the second one, on the orthonormal basis of the first round's product; this is a randomised SVD
with one power step (Halko et al. 2011, "Finding Structure with Randomness", section 4.4) of what
these two rounds learn. From the third round on, only the core is trained. The first two rounds are
as large as RoLoRA's, and a whole adapter contains B and A. Tensors that are no factors, such as a
classification head, are trained in every round.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from silotune.algorithms.base import Facts
from silotune.algorithms.factors import (
    narrow,
    needs_pairs,
    padded,
    starts_at_random,
    starts_at_zero,
    svd,
    wide,
)
from silotune.algorithms.fedavg import FedAvgConfig, fedavg, move
from silotune.core.algorithm import Algorithm, LocalRule
from silotune.core.errors import ConfigError
from silotune.core.lora import is_core, pairs_of
from silotune.core.types import AdapterState, Change, ServerState

FACTOR_ROUNDS = 2
"""Rounds in which a factor is trained: B, then A."""


class FedSBConfig(FedAvgConfig):
    """Settings of Fed-SB, the same as FedAvg's."""

    facts: ClassVar[Facts] = Facts(
        paper='Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency '
        'and Performance in (Private) Federated LoRA Fine-Tuning", arXiv:2502.15436',
        differs="The frozen factors are the singular vectors of what two rounds learn, in which "
        "clients train B and then A; the paper decomposes the gradient of the full weights. These "
        "rounds are as large as RoLoRA's; from the third on only the core is sent. B and A "
        "come down with a whole adapter only. A classification head is trained in every round.",
        exact="yes",
        needs_lora=True,
        core=True,
        up="B, then A, then the core",
        down="adapter, core",
    )


def fed_sb(cfg: FedSBConfig) -> Algorithm:
    """Build Fed-SB.

    Its `init` raises a ConfigError if the adapter does not have both factors, and its `begin` if a
    module is no linear layer.
    """

    def step(state: ServerState, change: Change) -> ServerState:
        moved = move(state, change.delta, server_lr=cfg.server_lr)
        if moved.round > FACTOR_ROUNDS:
            return moved
        adapter = dict(moved.adapter)
        for pair in pairs_of(adapter):
            rank = len(adapter[pair.right])
            u, s, vh = svd(*wide(adapter, pair))
            core = torch.eye(rank, dtype=s.dtype)
            if moved.round == FACTOR_ROUNDS:
                core = torch.nn.functional.pad(torch.diag(s), (0, rank - len(s)) * 2)
            else:
                vh = s[:, None] * vh
            adapter |= narrow(*padded(u, vh, rank), pair, adapter)
            adapter[pair.core] = core.to(adapter[pair.core].dtype)
        return replace(moved, adapter=adapter)

    return replace(
        fedavg(cfg),
        name="fed_sb",
        step=step,
        init=needs_pairs("fed_sb"),
        begin=with_cores,
        rewrites=_is_rewritten,
        local=LocalRule(trains=_is_trained),
    )


def with_cores(adapter: AdapterState) -> dict[str, Tensor]:
    """The adapter with the identity between the factors of every module.

    Raises:
        ConfigError: A module is no linear layer, and has no room for a core.
    """
    cores: dict[str, Tensor] = {}
    for pair in pairs_of(adapter):
        left = adapter[pair.left]
        if not pair.core or left.dim() > 2:
            raise ConfigError(
                "algorithm.name = 'fed_sb' trains a matrix between the factors of a linear layer, "
                f"but '{pair.left}' belongs to another kind of module.\n"
                "  Name linear layers only in adapter.targets, or choose another algorithm."
            )
        cores[pair.core] = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    return {**adapter, **cores}


def _is_rewritten(name: str, round_: int) -> bool:
    between = starts_at_zero(name) or starts_at_random(name) or is_core(name)
    return round_ <= FACTOR_ROUNDS and between


def _is_trained(name: str, round_: int) -> bool:
    if round_ > FACTOR_ROUNDS:
        return not (starts_at_zero(name) or starts_at_random(name))
    rests = starts_at_random if round_ == 1 else starts_at_zero
    return not (rests(name) or is_core(name))
