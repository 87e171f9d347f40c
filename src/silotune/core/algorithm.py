"""What an algorithm is: four functions and a few facts about them.

The server side is pure arithmetic on adapter states. The client side is a `LocalRule`: data that
the training loop reads, so that no algorithm writes its own loop.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from silotune.core.tree import layout_of
from silotune.core.types import AdapterState, Change, Layout, ServerState, Settings, Updates


@dataclass(frozen=True)
class LocalContext:
    """What a local rule may look at during one client's training."""

    received: AdapterState
    """The adapter as it arrived, with the client's own personal tensors in their place."""
    extra: Mapping[str, AdapterState]
    """The server's extra broadcast, for instance a global control variate."""
    memory: Mapping[str, AdapterState]
    """What this client kept from its own earlier rounds; empty at first. The purpose "personal" is
    taken: it holds the personal tensors."""


@dataclass(frozen=True)
class LocalOutcome:
    """What a local rule leaves behind after training."""

    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """Sent to the server beside the delta."""
    memory: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """Kept at the client until its next round; never sent."""


def all_tensors(name: str, round_: int) -> bool:  # noqa: ARG001 - the signature of `trains`
    """The default of `trains`: every tensor of the adapter learns in every round."""
    return True


@dataclass(frozen=True)
class LocalRule:
    """What changes in local training. The defaults change nothing: plain local steps."""

    penalty: Callable[[Mapping[str, Tensor], LocalContext], Tensor] | None = None
    """Added to the loss once per optimizer step, given the tensors that learn."""
    correct: Callable[[str, Tensor, LocalContext], Tensor] | None = None
    """(name, gradient, context) -> the gradient that clipping and the optimizer see instead."""
    trains: Callable[[str, int], bool] = all_tensors
    """(name, round): whether a tensor learns and is sent this round; others stay as received."""
    personal: Callable[[str], bool] = lambda name: False
    """(name): whether a tensor learns but stays at the client, in its memory, and is never sent."""
    finish: Callable[[AdapterState, float, LocalContext], LocalOutcome] | None = None
    """(delta, sum of the step sizes, context) -> what else is sent and what is remembered."""
    settings: Settings = field(default_factory=dict[str, float])
    """The rule's constants.

    A client echoes those it used; the server refuses an update that used others.
    """


def no_extra(
    adapter: AdapterState,  # noqa: ARG001 - as `init`
    num_clients: int,  # noqa: ARG001 - as `init`
) -> dict[str, AdapterState]:
    """The default of `init`: an algorithm without memory."""
    return {}


@dataclass(frozen=True)
class Algorithm:
    """One federated algorithm: `init`, `local`, `combine`, `step`, and facts that others need."""

    name: str
    combine: Callable[[ServerState, Updates], Change]
    """(state, updates in name order) -> the change: many deltas become one."""
    step: Callable[[ServerState, Change], ServerState]
    """(state, change) -> the state after the round; adds one to `round`."""
    init: Callable[[AdapterState, int], Mapping[str, AdapterState]] = no_extra
    """(first adapter, number of all clients) -> the algorithm's own memory."""
    local: LocalRule = field(default_factory=LocalRule)
    layout: Callable[[ServerState], Layout] | None = None
    """What an update must look like in the round that follows `state`.

    By default the tensors that train and are not personal.
    """
    extra_layout: Callable[[ServerState], Mapping[str, Layout]] | None = None
    """What an update must bring beside the delta in the round that follows `state`; by default
    nothing."""
    broadcasts: tuple[str, ...] = ()
    """Names of the extra memory that clients receive with the adapter."""
    linear: bool = True
    """Whether the change is a weighted sum of deltas, as secure sums and noise on clients need."""


def keep_local(algorithm: Algorithm, names: Collection[str]) -> Algorithm:
    """The same algorithm, but these tensors are each client's own: learned, and never sent."""
    if not names:
        return algorithm
    local, own = algorithm.local, frozenset(names)

    def personal(name: str) -> bool:
        return name in own or local.personal(name)

    return replace(algorithm, local=replace(local, personal=personal))


def expected_layout(algorithm: Algorithm, state: ServerState) -> Layout:
    """What an update must look like in the round after `state`."""
    if algorithm.layout is not None:
        return algorithm.layout(state)
    local, round_ = algorithm.local, state.round + 1
    return {
        name: spec
        for name, spec in layout_of(state.adapter).items()
        if local.trains(name, round_) and not local.personal(name)
    }


def expected_extra(algorithm: Algorithm, state: ServerState) -> Mapping[str, Layout]:
    """What an update must bring beside the delta in the round after `state`."""
    return {} if algorithm.extra_layout is None else algorithm.extra_layout(state)


def broadcast_extra(state: ServerState, algorithm: Algorithm) -> dict[str, AdapterState]:
    """What clients receive beside the adapter in the round after `state`."""
    return {name: state.extra[name] for name in algorithm.broadcasts}
