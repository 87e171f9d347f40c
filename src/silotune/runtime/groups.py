"""How many clients of a simulation share a batch: `runtime.together`, and why they may not.

The rule for "auto" follows from facts alone (the device, the lengths of the rows), never from a
clock: the same recipe forms the same groups everywhere, and so gives the same bytes again.
"""

import contextlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from silotune.core.errors import ConfigError
from silotune.federation.client import ClientData, Worker
from silotune.federation.sampling import cohort_of
from silotune.federation.together import ROWS
from silotune.models.stacked import why_not_stacked
from silotune.recipes.schema import RunConfig
from silotune.recipes.together import obstacles
from silotune.training.together import MOST_TOKENS

MOST_CLIENTS = 32
"""With "auto", so many adapters and optimizers are held at most."""


@dataclass(frozen=True)
class Groups:
    """How a run's clients are handed over."""

    size: int = 1
    """Clients of a group; 1 for one after another."""
    most_tokens: int | None = None
    """As in `train_together`."""
    note: str | None = None
    """What a person should know: that they are alone although "auto" could have joined them."""


def plan_groups(worker: Worker, data: Mapping[str, ClientData]) -> Groups:
    """Decide it for a run.

    Args:
        worker: The process's model.
        data: Every client's rows.

    Raises:
        ConfigError: The recipe asks for a number of clients, and this model cannot do it.
    """
    wanted = worker.run.runtime.together
    if wanted == 1:
        return Groups()
    if wanted != "auto":
        if (why := why_not_stacked(worker.loaded)) is not None:
            raise ConfigError(
                f"runtime.together = {wanted}: {why}.\n"
                "  Remove it, or set runtime.together = 'auto', which then trains one client after "
                "another."
            )
        return Groups(wanted)
    lengths = _first_lengths(worker.run, data)
    why = why_alone(worker.run, lengths, worker.loaded.device.type)
    why = why or why_not_stacked(worker.loaded)
    if not lengths and why is None:
        why = "no row of the clients that round 1 asks can be used"
    if why is not None:
        return Groups(note=f"runtime.together = 'auto': one client after another, because {why}")
    return Groups(auto_size(worker.run, lengths), MOST_TOKENS)


def _first_lengths(run: RunConfig, data: Mapping[str, ClientData]) -> list[int]:
    """Tokens of rows of the clients that round 1 asks: those of the others are not needed yet."""
    lengths: list[int] = []
    for name in cohort_of(run, list(data), 1):
        with contextlib.suppress(*ROWS):  # such a client fails when it is asked
            lengths += [example.num_positions for example in data[name].examples]
    return lengths


def why_alone(run: RunConfig, lengths: list[int], device: str) -> str | None:
    """Why "auto" trains one client after another, as far as that is known without the model.

    Args:
        run: The recipe.
        lengths: Tokens of rows of clients that round 1 asks; none if they are unknown.
        device: Type of the device that trains.
    """
    for what, why in obstacles(run):
        return f"of {what}: {why}"
    if device != "cpu":
        return f"its gain was measured on CPUs only, not on '{device}'"
    if lengths and auto_size(run, lengths) == 1:
        return (
            f"a client's pass has about {_tokens(run, lengths)} tokens, and joining more than "
            f"{MOST_TOKENS} may be slower"
        )
    return None


def auto_size(run: RunConfig, lengths: list[int]) -> int:
    """How many clients' passes of median rows have no more tokens together than is worth joining.

    Args:
        run: The recipe.
        lengths: Tokens of rows of clients that round 1 asks, at least one.
    """
    return max(1, min(MOST_CLIENTS, MOST_TOKENS // _tokens(run, lengths)))


def _tokens(run: RunConfig, lengths: list[int]) -> int:
    return max(1, run.train.batch_size * int(statistics.median(lengths)))
