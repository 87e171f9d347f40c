"""What releases cost: epsilon for a delta, by two accountants of dp-accounting that must agree.

Both compose Gaussian mechanisms for neighbours that differ by one unit added or removed. The
privacy loss distribution (PLD: Koskela et al. 2020, Doroshenko et al. 2022) is tight to its
discretisation, which is pessimistic; Renyi accounting (RDP: Mironov 2017) is an upper bound of it.
"""

import functools
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from silotune.errors import ConfigError

LIBRARY = ("dp_accounting", "dp_accounting.pld", "dp_accounting.rdp")
GRID, GRID_SHARE = 1e-4, 1e-5
"""Width of the PLD accountant's grid, and its least share of epsilon; both round up."""
SLACK = 1.001
"""By what the tight bound may be above the loose one: discretisation."""


@dataclass(frozen=True)
class Epsilon:
    """What was spent, by two accountants."""

    pld: float
    """The number that is promised."""
    rdp: float


def spent(*, noise_multiplier: float, num_releases: int, delta: float) -> Epsilon:
    """Epsilon of so many Gaussian releases on everybody: no sampling, so no gain by it.

    Args:
        noise_multiplier: Standard deviation of the noise by the sensitivity.
        num_releases: Of the same size.
        delta: Between 0 and 1.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    if num_releases == 0:
        return Epsilon(0.0, 0.0)
    if noise_multiplier == 0:
        return Epsilon(math.inf, math.inf)
    # T Gaussians of one size are one Gaussian, sqrt(T) times as telling: exact, and quick
    return _of_one(noise_multiplier / math.sqrt(num_releases), delta)


@functools.lru_cache(maxsize=256)
def _of_one(noise_multiplier: float, delta: float) -> Epsilon:
    dp, pld_library, rdp_library = _libraries()
    release = dp.GaussianDpEvent(noise_multiplier)
    loose = rdp_library.RdpAccountant()
    loose.compose(release)
    rdp = float(loose.get_epsilon(delta))
    # the grid spans a multiple of epsilon: next to no noise would fill the memory with it
    width = max(GRID, GRID_SHARE * rdp)
    tight = pld_library.PLDAccountant(value_discretization_interval=width)
    tight.compose(release)
    pld = float(tight.get_epsilon(delta))
    assert pld <= rdp * SLACK, f"accountants disagree: PLD {pld}, RDP {rdp}"
    return Epsilon(pld, rdp)


def noise_for(*, target_epsilon: float, num_releases: int, delta: float) -> float:
    """The smallest noise multiplier, to four digits, that keeps the releases within an epsilon.

    Args:
        target_epsilon: By the PLD accountant.
        num_releases: As many as are planned.
        delta: Between 0 and 1.
    """

    def fits(noise_multiplier: float) -> bool:
        cost = spent(noise_multiplier=noise_multiplier, num_releases=num_releases, delta=delta)
        return cost.pld <= target_epsilon

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
    while high - low > 5e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return float(f"{high:.6g}") if fits(float(f"{high:.6g}")) else high


def _libraries() -> tuple[Any, Any, Any]:
    """dp_accounting and its two accountants' modules."""
    try:
        dp, pld, rdp = map(import_module, LIBRARY)
    except ImportError as error:
        raise ConfigError(
            "[privacy] needs dp-accounting, which is not installed.\n"
            "  Install it: pip install 'silotune[privacy]'"
        ) from error
    return dp, pld, rdp
