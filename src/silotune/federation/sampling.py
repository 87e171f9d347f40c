"""Which clients take part in a round.

Depends only on the names and a generator, so a resumed run asks the same clients.
"""

import math
from collections.abc import Sequence

import torch

from silotune.core.errors import ConfigError
from silotune.core.seeds import generator
from silotune.core.wording import counted
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import SamplingConfig


def cohort_size(cfg: SamplingConfig, num_clients: int) -> int:
    """Number of clients to ask per round, out of `num_clients`.

    Raises:
        ConfigError: The recipe asks for more clients than exist.
    """
    if cfg.num_clients is None:
        # 1e-9: 0.29 * 100 is 28.999999999999996 in binary, but the user means 29
        return max(1, math.floor((cfg.fraction or 1.0) * num_clients + 1e-9))
    if cfg.num_clients > num_clients:
        raise ConfigError(
            f"sampling.num_clients = {cfg.num_clients}, but the data has only "
            f"{counted(num_clients, 'client')}.\n"
            f"  Set sampling.num_clients to {num_clients} or less, "
            "or split the data into more clients."
        )
    return cfg.num_clients


def sample(names: Sequence[str], cfg: SamplingConfig, gen: torch.Generator) -> list[str]:
    """Draw a round's cohort uniformly without replacement.

    Args:
        names: All clients; their order does not matter.
        cfg: How many to draw.
        gen: The generator for (seed, "sampling", round).

    Returns:
        The cohort, sorted by name.
    """
    if not names:
        raise ConfigError("there are no clients to ask.\n  Check the data and the partition.")
    ordered = sorted(names)
    chosen = torch.randperm(len(ordered), generator=gen)[: cohort_size(cfg, len(ordered))]
    return sorted(ordered[i] for i in map(int, chosen))


def cohort_of(run: RunConfig, names: Sequence[str], round_: int) -> list[str]:
    """The clients that a run asks in a round, sorted by name; see `sample`."""
    return sample(names, run.sampling, generator(run.seed, "sampling", round_))


def num_needed(cfg: SamplingConfig, cohort_size: int) -> int:
    """Minimum number of usable updates in a round: `ceil(quorum * cohort_size)`, at least 1."""
    return max(1, math.ceil(cfg.quorum * cohort_size - 1e-9))
