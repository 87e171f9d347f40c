"""What releases cost: epsilon for a delta, from two accountants of dp-accounting that must agree.

Both compose Gaussian mechanisms for neighbours that differ by one added or removed unit. The
privacy loss distribution (PLD: Koskela et al. 2020, Doroshenko et al. 2022) is tight up to its
discretisation, which is pessimistic; Renyi accounting (RDP: Mironov 2017) is an upper bound on it.

Discrete Gaussian noise on integers has at most the Renyi divergences of a Gaussian (Kairouz et al.
2021, arXiv:2102.06387, Proposition 14 with one client), but we know of no such proof for its
privacy loss distribution in many dimensions. Where a release has such noise, RDP's number is the
one that is guaranteed.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from silotune.core.errors import ConfigError

GRID, FINEST, COARSEST = 1e-5, 5e-5, 5e-4
"""The PLD accountant's grid: its minimum width, and its minimum and maximum share of epsilon. It
rounds up, more so with more releases, but only in digits that are never shown."""
SLACK = 1.001
"""Factor by which discretisation may lift the tight bound above the loose one."""


@dataclass(frozen=True)
class Epsilon:
    """The epsilon that was spent, by two accountants."""

    pld: float
    """The number that is guaranteed; RDP's if noise is discrete."""
    rdp: float


@dataclass(frozen=True)
class Steps:
    """Releases of one kind: Gaussian noise on the contributions of a random sample of the units."""

    noise_multiplier: float
    """Standard deviation of the noise, in units of the sensitivity."""
    num_releases: int
    sampling_rate: float = 1.0
    """Probability that a unit takes part in a release, drawn independently for each unit (Poisson)
    and in secret; 1 if all take part, or if sampling amplifies nothing."""
    discrete: bool = False
    """Whether the noise is discrete Gaussian, on whole numbers."""

    def __post_init__(self) -> None:
        assert not self.discrete or self.sampling_rate == 1, "no bound for sampled discrete noise"


def spent(
    *, noise_multiplier: float, num_releases: int, delta: float, sampling_rate: float = 1.0
) -> Epsilon:
    """Epsilon of releases of one kind; see `spent_in_all`."""
    return spent_in_all([Steps(noise_multiplier, num_releases, sampling_rate)], delta=delta)


def spent_in_all(steps: Iterable[Steps], *, delta: float) -> Epsilon:
    """Epsilon of all these releases together.

    Args:
        steps: In any order.
        delta: Between 0 and 1.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    counts = Counter[tuple[float, float]]()
    discrete = False
    for own in steps:
        counts[own.noise_multiplier, own.sampling_rate] += own.num_releases
        discrete = discrete or own.discrete
    kinds = tuple(sorted((z, n, q) for (z, q), n in counts.items() if n > 0 and q > 0))
    if not kinds:
        return Epsilon(0.0, 0.0)
    if any(z == 0 for z, _, _ in kinds):
        return Epsilon(math.inf, math.inf)
    if discrete:
        rdp = _loose(kinds, delta)
        return Epsilon(rdp, rdp)
    return _composed(kinds, delta)


@functools.lru_cache(maxsize=1024)
def _composed(kinds: tuple[tuple[float, int, float], ...], delta: float) -> Epsilon:
    rdp = _loose(kinds, delta)
    # the grid spans a multiple of epsilon: with a fixed width it would fill the memory
    share = 2e-3 / math.sqrt(sum(count for _, count, _ in kinds))
    width = max(GRID, min(max(share, FINEST), COARSEST) * rdp)
    tight: Any = _library("dp_accounting.pld").PLDAccountant(value_discretization_interval=width)
    try:
        for event in _events(kinds):
            tight.compose(event)
        pld = float(tight.get_epsilon(delta))
    except OverflowError:  # so little noise that the loose bound will do
        pld = rdp
    assert pld <= rdp * SLACK + width, f"accountants disagree: PLD {pld}, RDP {rdp}"
    return Epsilon(pld, rdp)


def _loose(
    kinds: tuple[tuple[float, int, float], ...], delta: float, orders: Sequence[int] | None = None
) -> float:
    """The bound from Renyi divergences; with integer orders only, slightly looser but fast."""
    accountant: Any = _library("dp_accounting.rdp").RdpAccountant(orders)
    with _quiet():
        for event in _events(kinds):
            accountant.compose(event)
        return float(accountant.get_epsilon(delta))


def _events(kinds: tuple[tuple[float, int, float], ...]) -> list[Any]:
    dp: Any = _library("dp_accounting")
    events: list[Any] = []
    for z, count, q in kinds:
        if q == 1:  # T equal Gaussians are one whose noise is smaller by sqrt(T): exact and fast
            events.append(dp.GaussianDpEvent(z / math.sqrt(count)))
        else:
            sampled = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
            events.append(dp.SelfComposedDpEvent(sampled, count))
    return events


@contextmanager
def _quiet() -> Generator[None]:
    """Silence RDP's warning that it skips orders whose series does not converge, which is sound."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def noise_for(
    *,
    target_epsilon: float,
    num_releases: int,
    delta: float,
    sampling_rate: float = 1.0,
    discrete: bool = False,
) -> float:
    """The smallest noise multiplier that keeps the releases within an epsilon.

    It is above the smallest by at most two parts in 100,000.

    Args:
        target_epsilon: Upper bound on the epsilon that is guaranteed.
        num_releases: Number of planned releases.
        delta: Between 0 and 1.
        sampling_rate: As in `Steps`.
        discrete: As in `Steps`.
    """
    optimize: Any = _library("scipy.optimize")  # dp-accounting depends on it

    def above(log_z: float, *, tight: bool = True) -> float:
        """The logarithm of the ratio of epsilon to its target."""
        kind = Steps(math.exp(log_z), num_releases, sampling_rate, discrete)
        kinds = ((kind.noise_multiplier, num_releases, sampling_rate),)
        if tight:
            found = spent_in_all([kind], delta=delta).pld
        else:
            found = _loose(kinds, delta, range(2, 65))
        return math.log(max(found, 1e-12) / target_epsilon)

    # the loose bound is fast and shows where to search: the tight one needs slightly less noise
    high = 0.0
    while above(high, tight=False) > 0:
        high += math.log(2)
    while above(high - math.log(2), tight=False) <= 0:
        high -= math.log(2)
    while above(high - 0.1, tight=False) <= 0:
        high -= 0.1
    low = high - 0.1
    while above(low) <= 0:
        high, low = low, low - 0.1
    log_z: float = optimize.brentq(above, low, high, xtol=1e-5)
    z = float(f"{math.exp(log_z):.6g}")
    while above(math.log(z)) > 0:
        z = float(f"{z * (1 + 1e-5):.6g}")
    return z


def third_opinion(steps: Steps, *, delta: float) -> float:
    """Epsilon by Opacus' PRV accountant (Gopi et al. 2021, arXiv:2106.02848): its upper bound.

    Infinite if epsilon is above 50, where that accountant's memory use has no bound.

    Raises:
        ConfigError: Opacus is not installed.
    """
    try:
        library: Any = import_module("opacus.accountants")
    except ImportError as error:
        raise ConfigError(
            "privacy.unit = 'record' needs opacus, which is not installed.\n"
            "  Install it: make env EXTRAS=privacy"
        ) from error
    if spent_in_all([steps], delta=delta).rdp > 50:
        return math.inf
    accountant = library.PRVAccountant()
    accountant.history = [(steps.noise_multiplier, steps.sampling_rate, steps.num_releases)]
    with np.errstate(all="ignore"):  # it correctly takes logarithms of 0 at the ends of its grid
        return float(accountant.get_epsilon(delta))


def _library(name: str) -> Any:
    """dp_accounting, one of its modules, or one of its dependencies."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            "[privacy] needs dp-accounting, which is not installed.\n"
            "  Install it: make env EXTRAS=privacy"
        ) from error
