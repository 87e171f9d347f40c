"""FedEx-LoRA: the mean factors, and beside them what they miss of the mean of the products.

Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", section 4. arXiv:2410.09432
The mean factors miss `R = sum_i p_i B_i A_i - mean(B) mean(A)`, the covariance of the factors over
the clients: `R = sum_i p_i (B_i - mean(B)) (A_i - mean(A))`. With K clients its rank is at most
(K - 1) r: each client adds its distance from the mean of those before it, and one pass over the
updates is enough (Welford 1962, "Note on a Method for Calculating Corrected Sums of Squares and
Products"). Differs from the paper: R is not added to the base's weights. All rounds' residuals
stand beside the adapter as frozen factors of 32 bits, with at most as many columns as the smaller
side of the module; so the base, which may be quantised, stays as it is.

On clients that differ, the residual goes on growing in directions that the adapter cannot correct
(toy O2 in tests/unit/algorithms/test_toy_o2.py): each round reports its size as `residual_ratio`, a
run warns if it has drifted, and there are two remedies. `residual_decay` below 1 lets old residuals
fade. With `residual = "export"` clients train FedAvg's mean factors in every round, and only the
last round's residual is added, to what leaves the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts, weight_of
from silotune.algorithms.factors import WITH_RESIDUAL, needs_pairs, wide
from silotune.algorithms.products import (
    RESIDUAL,
    SumOfProducts,
    added_beside,
    kept_dtype,
    replace_beside,
    report_residual,
    step_with_residual,
    trained,
)
from silotune.core.algorithm import Algorithm
from silotune.core.lora import Pair, pairs_of
from silotune.core.tree import add, weighted_mean
from silotune.core.types import AdapterState, Change, ServerState, Updates

EXPORT = "export"
"""In `Change.extra` and in the state's memory: a residual that only leaves the run."""
DRIFTED, GROWS = 0.2, 1.1
"""A run warns above this `residual_ratio`, if it has grown by so much since half of the rounds."""


class FedExConfig(AlgorithmConfig):
    """Settings of FedEx-LoRA."""

    residual: Literal["train", "export"] = "train"
    """train, as published: all rounds' residuals stand beside the adapter while clients train.
    export: clients receive the mean factors only, as in FedAvg, and the last round's residual is
    added to the result. Then nothing drifts, and messages are FedAvg's."""
    residual_decay: float = Field(default=1.0, ge=0, le=1)
    """Factor on the residual of earlier rounds. 1: as published, nothing fades. At 0 only the last
    round's residual is kept. Below 1 the new function is not exactly the clients' mean."""
    residual_rank: int | None = Field(default=None, ge=1)
    """Maximum rank of the residual of a module: the nearest product of that rank is kept, and
    clients receive no more. Absent: at most the smaller side of the module."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "FedExConfig":
        if self.residual == EXPORT and self.residual_decay != 1:
            raise ValueError("residual_decay only has an effect with residual = 'train'")
        return self

    @property
    def result_differs(self) -> bool:
        """With residual = "export": the last residual is in nothing that clients receive."""
        return self.residual == EXPORT

    facts: ClassVar[Facts] = Facts(
        paper='Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient '
        'Fine-Tuning of Foundation Models", section 4, arXiv:2410.09432',
        differs="The residual is not added to the base: it is kept beside the adapter as frozen "
        "factors of 32 bits, of at most the rank that the module has. `residual_decay` below 1, "
        '`residual_rank` and `residual = "export"` are ours, and with them the mean is not exact.',
        linear=False,
        exact="yes",
        needs_lora=True,
        residual=True,
        down="adapter, residual",
    )


def fedex(cfg: FedExConfig) -> Algorithm:
    """Build FedEx-LoRA.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        sums, total = SumOfProducts(), 0.0
        means: dict[Pair, tuple[Tensor, Tensor]] = {}

        def read() -> Iterator[tuple[float, AdapterState]]:
            nonlocal total
            for update in updates:
                weight, own = weight_of(update, cfg), trained(state.adapter, update)
                share = weight / (total + weight) if weight else 0.0
                total += weight
                for pair in pairs_of(own):
                    left, right = wide(own, pair)
                    old = means.get(pair, (left, right))
                    left, right = left - old[0], right - old[1]
                    kept = kept_dtype(own, pair)
                    sums.add(pair, (1 - share) * weight, left.to(kept), right.to(kept))
                    means[pair] = old[0] + share * left, old[1] + share * right
                yield weight, update.delta

        delta = weighted_mean(read())
        mean = add({name: state.adapter[name] for name in delta}, delta)
        where = EXPORT if cfg.residual == EXPORT else RESIDUAL
        kept = added_beside(
            {**state.adapter, **mean},
            sums.take(1 / total),
            decay=cfg.residual_decay,
            rank=cfg.residual_rank,
        )
        return Change(delta, {where: kept})

    def step(state: ServerState, change: Change) -> ServerState:
        moved = step_with_residual(state, change)
        return replace(moved, extra={**moved.extra, EXPORT: change.extra.get(EXPORT, {})})

    def result(state: ServerState) -> AdapterState:
        return replace_beside(state.adapter, state.extra.get(EXPORT, {}))

    def report(state: ServerState, change: Change) -> dict[str, float]:
        return report_residual(state, Change(change.delta, {RESIDUAL: change.extra[EXPORT]}))

    plain = Algorithm(
        name="fedex",
        combine=combine,
        step=step_with_residual,
        init=needs_pairs("fedex"),
        local=WITH_RESIDUAL,
        report=report_residual,
        linear=False,
    )
    if cfg.residual == EXPORT:
        return replace(plain, step=step, report=report, result=result)
    return plain


def drift_warning(ratios: Sequence[float]) -> str:
    """A sentence if the residual has drifted; empty if not.

    Args:
        ratios: `residual_ratio` of all rounds, in order.
    """
    if not ratios:
        return ""
    half, last = ratios[(len(ratios) - 1) // 2], ratios[-1]
    if last <= DRIFTED or last <= GROWS * half:
        return ""
    return (
        f"what stands beside the adapter goes on growing, to {last:.2f} of the adapter's size from "
        f"{half:.2f} at half of the rounds: on clients that differ it drifts. Compare with "
        "algorithm.residual = 'export' and with algorithm.residual_decay = 0.9"
    )
