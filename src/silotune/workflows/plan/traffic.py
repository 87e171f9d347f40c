"""What a run sends, to the byte, if every client answers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from silotune.compression.changes import travels
from silotune.core.algorithm import Algorithm, expected_layout, keep_local
from silotune.core.tree import layout_bytes, size_bytes
from silotune.core.types import ServerState
from silotune.federation.budget import RoundCost, is_within, round_cost
from silotune.federation.encrypted_sum import as_ciphertexts
from silotune.federation.secure_sum import as_words
from silotune.recipes.schema import RunConfig
from silotune.workflows.plan.shapes import Shapes, first_state

HEADER_BYTES = 128
"""What FlowerTune's tracker adds for every tensor: the header of a .npy file."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of the messages with tensors, as metrics.jsonl counts them, if every client answers."""

    down: int
    """Message to a client that has to receive the whole adapter, as after missing a round."""
    news: int
    """Message to a client that holds the adapter of the round before, in the second round."""
    up: int
    """Update from one client in that round."""
    head_down: int
    """The classification head's part of `down`."""
    head_up: int
    """The classification head's part of `up`."""
    kept: int
    """Tensors that are trained and never sent."""
    num_values: int
    """How many numbers are trained."""
    num_clients: int
    num_asked: int
    """Clients that train in a round."""
    rounds: int
    """Rounds of the run: fewer than the recipe's if budget.bytes ends it early."""
    per_round: int
    """Training messages of the first round, both ways."""
    training: int
    """All training messages, both ways."""
    scoring: int
    """All messages that only ask for a score."""
    bytes_down: int
    """All messages to clients, as in summary.json."""
    bytes_up: int
    """All messages from clients, as in summary.json."""
    tracker_mib: float
    """The count of FlowerTune's tracker in MiB: only training messages, 4 bytes per number and 128
    per tensor."""

    @property
    def total(self) -> int:
        """All bytes, both ways."""
        return self.bytes_down + self.bytes_up


def traffic(run: RunConfig, shapes: Shapes, algorithm: Algorithm, num_clients: int) -> Traffic:
    """Compute what a run sends, to the byte, with the `budget.round_cost` that the run itself uses.

    Raises:
        ConfigError: budget.bytes is too small for even one round.
    """
    algorithm = keep_local(
        algorithm, shapes.head if run.adapter.head == "local" else frozenset[str]()
    )
    if run.secure_sum.is_on:
        hidden = {"masks": as_words, "ckks": as_ciphertexts}[run.secure_sum.kind]
        algorithm = hidden(algorithm)
    state = first_state(shapes, algorithm, num_clients)
    costs = list(expected_rounds(run, state, algorithm, num_clients))
    sent = expected_layout(algorithm, state)
    payload = travels(run.wire, sent)
    head = {n: t for n, t in state.adapter.items() if n in shapes.head}
    own = {n: t for n, t in state.adapter.items() if algorithm.local.personal(n)}
    last = costs[-1].last_bytes
    down = sum(cost.bytes_down for cost in costs) + last
    up = sum(cost.bytes_up for cost in costs)
    training = sum(cost.training for cost in costs)
    num_down = len(state.adapter) + sum(len(state.extra[key]) for key in algorithm.broadcasts)
    one_each = costs[0].down + costs[0].up + HEADER_BYTES * (num_down + len(payload))
    return Traffic(
        down=costs[0].down,
        news=costs[min(1, len(costs) - 1)].news,
        up=costs[0].up,
        head_down=size_bytes(head),
        head_up=layout_bytes(travels(run.wire, {n: s for n, s in sent.items() if n in head})),
        kept=size_bytes(own),
        num_values=sum(t.numel() for t in state.adapter.values()),
        num_clients=num_clients,
        num_asked=costs[0].num_asked,
        rounds=len(costs),
        per_round=costs[0].training,
        training=training,
        scoring=down + up - training,
        bytes_down=down,
        bytes_up=up,
        tracker_mib=len(costs) * costs[0].num_asked * one_each / 2**20,
    )


def expected_rounds(
    run: RunConfig, state: ServerState, algorithm: Algorithm, num_clients: int
) -> Iterator[RoundCost]:
    """The rounds that budget.bytes allows, with what each sends if every client answers.

    Args:
        run: The recipe.
        state: Any state of the run; only the sizes of its tensors matter.
        algorithm: Knows the tensors that stay with the clients; see `keep_local`.
        num_clients: The number of clients.

    Raises:
        ConfigError: budget.bytes is too small for even one round.
    """
    spent = 0
    for done in range(run.rounds):
        cost = round_cost(run, replace(state, round=done), algorithm, num_clients)
        if not is_within(run.budget.bytes, spent, cost, first=done == 0):
            return
        spent += cost.bytes_down + cost.bytes_up
        yield cost
