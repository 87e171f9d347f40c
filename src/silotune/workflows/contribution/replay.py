"""A run's rounds again, from its kept updates, with or without one client's. Nothing is trained.

The updates are the recorded ones. Without a client, the others would have received other adapters
and sent other updates from the second round on, so a replay is not a retraining.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from silotune.core.algorithm import Algorithm
from silotune.core.types import ServerState
from silotune.federation.kept_updates import KeptUpdates


def replay(
    algorithm: Algorithm,
    first: ServerState,
    rounds: Mapping[int, KeptUpdates],
    *,
    without: str | None = None,
) -> Iterator[ServerState]:
    """The states after 0, 1, 2, ... rounds.

    Args:
        algorithm: The run's own `combine` and `step` make every state.
        first: The run's state before round 1.
        rounds: The updates, by round, from round 1 without a gap.
        without: The client that is left out. A round that nobody else took part in changes
            nothing.

    Raises:
        RunFolderError: An update is gone or damaged.
        QuorumError: The algorithm cannot combine so few updates.

    Reference:
        Song, Tong and Wei 2019, "Profit Allocation for Federated Learning", IEEE Big Data, its
        one-round reconstruction (OR): models of some of the clients are rebuilt from the recorded
        updates. There, of all subsets for Shapley values; here, of all clients but one.
    """
    state = first
    yield state
    for _, kept in sorted(rounds.items()):
        updates = kept if without is None else kept.without(without)
        if len(updates):
            state = algorithm.step(state, algorithm.combine(state, updates))
        else:
            state = replace(state, round=state.round + 1)
        yield state
