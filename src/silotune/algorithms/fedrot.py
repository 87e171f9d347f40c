"""FedRot-LoRA: each client turns its factors to those it received before it sends them.

Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA".
arXiv:2602.23638
`(B Q, Q^T A)` is the same function for every rotation Q, but the mean of factors is not the same
average. In odd rounds Q brings `Q^T A` nearest to the A received, in even rounds `B Q` nearest to
the B received: orthogonal Procrustes, with determinant 1. Bytes, privacy and base stay as they are.
Differs from the paper: a `strength` below 1 mixes Q with the identity and takes the nearest
rotation to the mixture.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from silotune.algorithms.base import Facts
from silotune.algorithms.factors import linalg, narrow, needs_pairs, pairs_of, wide
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm, LocalContext, LocalRule
from silotune.core.types import AdapterState


class FedRotConfig(FedAvgConfig):
    """Settings of FedRot-LoRA, in addition to FedAvg's."""

    strength: float = Field(default=1.0, ge=0, le=1)
    """How far the factors are turned. At 0 this is FedAvg."""
    facts: ClassVar[Facts] = Facts(
        paper='Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated '
        'LoRA", arXiv:2602.23638',
        differs="A strength below 1 mixes the rotation with the identity and takes the nearest "
        "rotation to the mixture.",
        exact="nearly",
        needs_lora=True,
    )


def fedrot(cfg: FedRotConfig) -> Algorithm:
    """Build FedRot-LoRA. The server side is FedAvg's.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def align(trained: AdapterState, context: LocalContext, round_: int) -> AdapterState:
        turned: dict[str, Tensor] = {}
        for pair in pairs_of(trained):
            (b, a), (b_received, a_received) = wide(trained, pair), wide(context.received, pair)
            by_right = (round_ % 2 == 1) == (pair.random == pair.right)
            overlap = a @ a_received.T if by_right else b.T @ b_received
            q = rotation(overlap, cfg.strength)
            turned |= narrow(b @ q, q.T @ a, pair, like=trained)
        return {**trained, **turned}

    # At 0 nothing is turned at all, so that strength = 0 is FedAvg to the last bit.
    settings: Mapping[str, float] = {"strength": cfg.strength}
    rule = LocalRule(align=align if cfg.strength > 0 else None, settings=dict(settings))
    return replace(fedavg(cfg), name="fedrot", local=rule, init=needs_pairs("fedrot"))


def rotation(overlap: Tensor, strength: float = 1.0) -> Tensor:
    """The rotation Q of largest `tr(Q^T overlap)`; part of the way with a strength below 1.

    With `overlap = A A_ref^T` it brings `Q^T A` nearest to A_ref, with `overlap = B^T B_ref` it
    brings `B Q` nearest to B_ref. An overlap of 0 gives the identity.

    Args:
        overlap: (r, r), float64.
        strength: Between 0 and 1.

    Returns:
        (r, r), orthogonal, with determinant 1.
    """
    eye = torch.eye(len(overlap), dtype=overlap.dtype)
    if not bool(overlap.any()):
        return eye
    q = _nearest(overlap)
    return q if strength == 1 else _nearest((1 - strength) * eye + strength * q)


def _nearest(matrix: Tensor) -> Tensor:
    """The nearest rotation: Kabsch 1976."""
    u, _, vh = linalg.svd(matrix)
    flip = torch.ones(len(matrix), dtype=matrix.dtype)
    flip[-1] = torch.sign(linalg.det(u) * linalg.det(vh))
    return (u * flip) @ vh
