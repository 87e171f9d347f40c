"""Rules that a few wrong or hostile clients cannot move at will. Every client has one vote.

Norm bound: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4.
arXiv:1911.07963
Median and trimmed mean, coordinate by coordinate: Yin et al. 2018, "Byzantine-Robust Distributed
Learning: Towards Optimal Statistical Rates", Definitions 1 and 2. arXiv:1803.01498
Geometric median: Pillutla, Kakade and Harchaoui 2022, "Robust Aggregation for Federated Learning",
Algorithm 2 (smoothed Weiszfeld). arXiv:1912.13445
Krum and Multi-Krum: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent", section 4. arXiv:1703.02757
Differs from the papers: distances between clients are those of LoRA's products, not of its factors,
so that a client cannot look near or far by turning its factors; the geometric median starts at the
median of each coordinate, and is not weighted by examples, which are a number that a client
reports. Memory is one adapter per client of the cohort. None of these stops poison of the usual
size, and clients that merely differ from the others look like attackers to all of them.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts
from silotune.algorithms.factors import pairs_of, squared_product_distance
from silotune.algorithms.fedavg import move
from silotune.core.algorithm import Algorithm
from silotune.core.errors import UpdateError
from silotune.core.tree import add, l2_norm, scale, weighted_mean
from silotune.core.types import AdapterState, Change, ServerState, Updates
from silotune.core.wording import counted

YIN = (
    'Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", '
    "arXiv:1803.01498"
)
BLANCHARD = (
    'Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient '
    'Descent", arXiv:1703.02757'
)
IN_PRODUCTS = "Distances are those of LoRA's products, so that rotated factors cannot deceive them."


class RobustConfig(AlgorithmConfig):
    """Settings of all robust rules."""

    # it cannot change, so a narrower type is safe
    weights: Literal["uniform"] = "uniform"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Every client has one vote: the number of its examples is what it says about itself."""
    server_lr: float = Field(default=1.0, gt=0)
    """Factor applied to the change."""


class NormBoundConfig(RobustConfig):
    """Settings of the norm bound."""

    norm: float = Field(default=1.0, gt=0)
    """Largest L2 norm of a client's change, over all tensors together; larger ones are scaled
    down to it. A client moves the mean by at most norm / number of clients."""
    facts: ClassVar[Facts] = Facts(
        paper='Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4, '
        "arXiv:1911.07963",
        differs="No noise is added; see `[privacy]` for that.",
        linear=False,
    )


class MedianConfig(RobustConfig):
    """Settings of the median, coordinate by coordinate."""

    facts: ClassVar[Facts] = Facts(
        paper=f"{YIN}, Definition 1",
        differs="Of an even number of clients it is the mean of the two in the middle.",
        linear=False,
    )


class TrimmedMeanConfig(RobustConfig):
    """Settings of the trimmed mean, coordinate by coordinate."""

    attackers: int = Field(default=1, ge=0)
    """How many of the lowest and how many of the highest values are left out. At 0 this is the
    mean."""
    facts: ClassVar[Facts] = Facts(
        paper=f"{YIN}, Definition 2",
        differs="A number of clients is left out, not a share.",
        linear=False,
    )

    @property
    def least_updates(self) -> int:
        """One value must remain."""
        return 2 * self.attackers + 1


class GeometricMedianConfig(RobustConfig):
    """Settings of the geometric median."""

    iterations: int = Field(default=8, ge=1, le=1000)
    """Steps of Weiszfeld's algorithm."""
    smoothing: float = Field(default=1e-6, gt=0)
    """Smallest distance that counts, so that no weight is infinite."""
    facts: ClassVar[Facts] = Facts(
        paper='Pillutla et al. 2022, "Robust Aggregation for Federated Learning", Algorithm 2, '
        "arXiv:1912.13445",
        differs=f"{IN_PRODUCTS} Clients have equal weights. It starts at the median of each "
        "coordinate, not at the mean.",
        linear=False,
    )


class KrumConfig(RobustConfig):
    """Settings of Krum."""

    attackers: int = Field(default=1, ge=0)
    """How many clients may be wrong, f: needs at least 2 f + 3 updates in a round."""
    facts: ClassVar[Facts] = Facts(paper=BLANCHARD, differs=IN_PRODUCTS, linear=False)

    @property
    def least_updates(self) -> int:
        """The paper's 2 f + 3."""
        return 2 * self.attackers + 3


class MultiKrumConfig(KrumConfig):
    """Settings of Multi-Krum."""

    selected: int | None = Field(default=None, ge=1)
    """How many updates are averaged, m; all but `attackers` if absent."""
    facts: ClassVar[Facts] = Facts(
        paper=f"{BLANCHARD}, section 5", differs=IN_PRODUCTS, linear=False
    )


def norm_bound(cfg: NormBoundConfig) -> Algorithm:
    """Build the mean of changes that are scaled down to a norm."""

    def combine(state: ServerState, updates: Updates) -> Change:  # noqa: ARG001 - interface
        bounded = (
            (1.0, scale(u.delta, min(1.0, cfg.norm / max(l2_norm(u.delta), 1e-300))))
            for u in updates
        )
        return Change(weighted_mean(bounded))

    return _algorithm("norm_bound", cfg, combine)


def median(cfg: MedianConfig) -> Algorithm:
    """Build the median of every coordinate."""
    return _algorithm("median", cfg, _by_coordinate(_middle))


def trimmed_mean(cfg: TrimmedMeanConfig) -> Algorithm:
    """Build the mean of every coordinate without its lowest and highest values.

    Its `combine` raises an UpdateError if nothing remains.
    """

    def trimmed(values: Tensor) -> Tensor:
        cut = cfg.attackers
        return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)

    def combine(state: ServerState, updates: Updates) -> Change:
        _need(state, updates, cfg)
        return _by_coordinate(trimmed)(state, updates)

    return _algorithm("trimmed_mean", cfg, combine)


def geometric_median(cfg: GeometricMedianConfig) -> Algorithm:
    """Build the point with the smallest sum of distances to the clients."""

    def combine(state: ServerState, updates: Updates) -> Change:
        deltas = [u.delta for u in updates]
        here, trained = _trained(state, deltas)
        pairs = pairs_of(here)
        found = _by_coordinate(_middle)(state, updates).delta  # near it, unlike the mean
        for _ in range(cfg.iterations):
            centre = add(here, found)
            weights = [
                1 / max(squared_product_distance(t, centre, pairs) ** 0.5, cfg.smoothing)
                for t in trained
            ]
            found = weighted_mean(zip(weights, deltas, strict=True))
        return Change(found)

    return _algorithm("geometric_median", cfg, combine)


def krum(cfg: KrumConfig) -> Algorithm:
    """Build Krum: the update that is nearest to most others.

    Its `combine` raises an UpdateError if fewer than 2 f + 3 updates arrived.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        _need(state, updates, cfg)
        deltas = [u.delta for u in updates]
        return Change(dict(deltas[_ranked(state, deltas, cfg.attackers)[0]]))

    return _algorithm("krum", cfg, combine)


def multi_krum(cfg: MultiKrumConfig) -> Algorithm:
    """Build Multi-Krum: the mean of the updates that Krum ranks first.

    Its `combine` raises an UpdateError if fewer than 2 f + 3 updates arrived.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        _need(state, updates, cfg)
        deltas = [u.delta for u in updates]
        num = min(cfg.selected or len(deltas) - cfg.attackers, len(deltas))
        best = sorted(_ranked(state, deltas, cfg.attackers)[:num])
        return Change(weighted_mean((1.0, deltas[i]) for i in best))

    return _algorithm("multi_krum", cfg, combine)


def _algorithm(
    name: str, cfg: RobustConfig, combine: Callable[[ServerState, Updates], Change]
) -> Algorithm:
    def step(state: ServerState, change: Change) -> ServerState:
        return move(state, change.delta, server_lr=cfg.server_lr)

    return Algorithm(name=name, combine=combine, step=step, linear=False)


def _by_coordinate(rule: Callable[[Tensor], Tensor]) -> Callable[[ServerState, Updates], Change]:
    """Apply a rule to the clients' values of each coordinate: (clients, ...) -> (...)."""

    def combine(state: ServerState, updates: Updates) -> Change:  # noqa: ARG001 - interface
        deltas = [u.delta for u in updates]
        return Change(
            {
                name: rule(torch.stack([d[name].double() for d in deltas])).to(t.dtype)
                for name, t in deltas[0].items()
            }
        )

    return combine


def _middle(values: Tensor) -> Tensor:
    ordered = values.sort(dim=0).values
    half = (len(values) - 1) // 2
    return (ordered[half] + ordered[len(values) - 1 - half]) / 2


def _trained(
    state: ServerState, deltas: Sequence[AdapterState]
) -> tuple[AdapterState, list[AdapterState]]:
    """What the clients received, and what each has after training."""
    here = {name: state.adapter[name] for name in deltas[0]}
    return here, [add(here, delta) for delta in deltas]


def _ranked(state: ServerState, deltas: Sequence[AdapterState], attackers: int) -> list[int]:
    """The updates by their sum of squared distances to the n - f - 2 nearest others, best first."""
    here, trained = _trained(state, deltas)
    pairs, num = pairs_of(here), len(deltas)
    far = torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        for j in range(i):
            far[i, j] = far[j, i] = squared_product_distance(trained[i], trained[j], pairs)
    # each row begins with the distance to itself, which is 0
    scores = far.sort(dim=1).values[:, 1 : num - attackers - 1].sum(dim=1)
    return sorted(range(num), key=lambda i: (float(scores[i]), i))


def _need(state: ServerState, updates: Updates, cfg: TrimmedMeanConfig | KrumConfig) -> None:
    if len(updates) < cfg.least_updates:
        raise UpdateError(
            f"round {state.round + 1}: {counted(len(updates), 'update')} cannot be combined with "
            f"algorithm.attackers = {cfg.attackers}, which needs {cfg.least_updates}.\n"
            "  Ask more clients per round ([sampling]), or start a run with fewer attackers."
        )
