"""What an algorithm is: four functions and a few facts about them.

The server side is pure arithmetic on adapter states. The client side is a `LocalRule`: data that
the training loop reads, so that no algorithm writes its own loop.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from silotune.core.lora import at_rank
from silotune.core.tree import layout_of
from silotune.core.types import (
    AdapterState,
    Broadcast,
    Change,
    Layout,
    ServerState,
    Settings,
    Updates,
)


@dataclass(frozen=True)
class LocalContext:
    """What a local rule can see while one client trains."""

    received: AdapterState
    """The adapter as received, with the client's personal tensors filled in."""
    extra: Mapping[str, AdapterState]
    """The server's extra broadcast, for example a global control variate."""
    memory: Mapping[str, AdapterState]
    """What this client kept from its earlier rounds; empty at first. The purpose "personal" is
    reserved for the personal tensors."""


@dataclass(frozen=True)
class LocalOutcome:
    """What a local rule returns after training."""

    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """Sent to the server with the delta."""
    memory: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """Kept at the client until its next round; never sent."""


def all_tensors(name: str, round_: int) -> bool:  # noqa: ARG001 - the signature of `trains`
    """The default of `trains`: every tensor of the adapter is trained in every round."""
    return True


@dataclass(frozen=True)
class LocalRule:
    """How an algorithm changes local training. The defaults change nothing: plain local steps."""

    penalty: Callable[[Mapping[str, Tensor], LocalContext], Tensor] | None = None
    """Added to the loss once per optimizer step; takes the tensors that are trained."""
    correct: Callable[[str, Tensor, LocalContext], Tensor] | None = None
    """(name, gradient, context) -> the gradient that clipping and the optimizer see instead."""
    trains: Callable[[str, int], bool] = all_tensors
    """(name, round): whether a tensor is trained and sent this round; others stay as received."""
    personal: Callable[[str], bool] = lambda name: False
    """(name): whether a tensor is trained but stays in the client's memory and is never sent."""
    align: Callable[[AdapterState, LocalContext, int], AdapterState] | None = None
    """(trained adapter, context, round) -> the same function in other tensors, before the delta is
    taken: for example rotated factors."""
    finish: Callable[[AdapterState, float, LocalContext], LocalOutcome] | None = None
    """(delta, sum of the step sizes, context) -> what else is sent and what is remembered."""
    settings: Settings = field(default_factory=dict[str, float])
    """The rule's constants.

    A client echoes the ones it used; the server refuses an update that used different ones.
    """


def no_extra(
    adapter: AdapterState,  # noqa: ARG001 - as `init`
    num_clients: int,  # noqa: ARG001 - as `init`
) -> dict[str, AdapterState]:
    """The default of `init`: an algorithm without memory."""
    return {}


def as_it_is(adapter: AdapterState) -> AdapterState:
    """The default of `begin`: the run starts from the adapter that the recipe describes."""
    return adapter


def as_received(state: ServerState) -> AdapterState:
    """The default of `result`: what leaves the run is what clients receive."""
    return state.adapter


@dataclass(frozen=True)
class Algorithm:
    """One federated algorithm: `init`, `local`, `combine`, `step`, and facts about them."""

    name: str
    combine: Callable[[ServerState, Updates], Change]
    """(state, updates in name order) -> the change: many deltas become one."""
    step: Callable[[ServerState, Change], ServerState]
    """(state, change) -> the state after the round; adds one to `round`."""
    init: Callable[[AdapterState, int], Mapping[str, AdapterState]] = no_extra
    """(first adapter, total number of clients) -> the algorithm's memory."""
    begin: Callable[[AdapterState], AdapterState] = as_it_is
    """(the recipe's first adapter) -> the adapter of the first round: the same function, to which
    an algorithm may add tensors of its own."""
    local: LocalRule = field(default_factory=LocalRule)
    layout: Callable[[ServerState, str | None], Layout] | None = None
    """(state, client): the layout of a client's update in the round after `state`.

    With mixed ranks it differs by client; None stands for the largest update of any client. By
    default the tensors that are trained and not personal, the same for all clients.
    """
    extra_layout: Callable[[ServerState, str | None], Mapping[str, Layout]] | None = None
    """(state, client): what an update must contain besides the delta in the round after `state`; by
    default nothing. None as in `layout`."""
    tailor: Callable[[Broadcast, str], Broadcast] | None = None
    """(the common broadcast, client): what this client receives instead, never larger: for example
    an adapter truncated to a lower rank. By default all clients receive the same."""
    result: Callable[[ServerState], AdapterState] = as_received
    """(state after the last round) -> the adapter that leaves the run. It is scored once more."""
    report: Callable[[ServerState, Change], Mapping[str, float]] | None = None
    """(state, change) -> numbers about this round for metrics.jsonl; they change nothing."""
    rewrites: Callable[[str, int], bool] = lambda name, round_: False
    """(name, round): whether the server's step changes a tensor that no client has trained in this
    round. Decides how many bytes a round is expected to send down, and nothing else."""
    broadcasts: tuple[str, ...] = ()
    """Names of the parts of the memory that clients receive with the adapter."""
    linear: bool = True
    """Whether the change is a weighted sum of deltas, as secure sums and noise on clients need."""


def starting_state(algorithm: Algorithm, adapter: AdapterState, num_clients: int) -> ServerState:
    """The server's state before the first round.

    Args:
        algorithm: Of the run.
        adapter: The recipe's first one.
        num_clients: All that could take part.

    Raises:
        ConfigError: The algorithm cannot work on such an adapter.
    """
    memory = algorithm.init(adapter, num_clients)
    return ServerState(0, algorithm.begin(adapter), memory)


def keep_local(algorithm: Algorithm, names: Collection[str]) -> Algorithm:
    """The same algorithm, but each client keeps these tensors: they are trained and never sent."""
    if not names:
        return algorithm
    local, own = algorithm.local, frozenset(names)

    def personal(name: str) -> bool:
        return name in own or local.personal(name)

    return replace(algorithm, local=replace(local, personal=personal))


def with_ranks(algorithm: Algorithm, rank_of: Callable[[str], int | None]) -> Algorithm:
    """The same algorithm for clients that train LoRA factors of lower ranks than the server's.

    A client of rank r receives the first r columns and rows of every pair of factors, and its
    update has their shapes.

    Args:
        algorithm: One that accepts mixed ranks.
        rank_of: A client's rank by its name; None for the server's.
    """

    def layout(state: ServerState, client: str | None) -> Layout:
        rank = None if client is None else rank_of(client)
        adapter = state.adapter if rank is None else at_rank(state.adapter, rank)
        return expected_layout(algorithm, replace(state, adapter=adapter), client)

    def tailor(common: Broadcast, client: str) -> Broadcast:
        rank = rank_of(client)
        return common if rank is None else replace(common, adapter=at_rank(common.adapter, rank))

    return replace(algorithm, layout=layout, tailor=tailor)


def expected_layout(algorithm: Algorithm, state: ServerState, client: str | None = None) -> Layout:
    """The layout of a client's update in the round after `state`; None: of the largest update."""
    if algorithm.layout is not None:
        return algorithm.layout(state, client)
    local, round_ = algorithm.local, state.round + 1
    return {
        name: spec
        for name, spec in layout_of(state.adapter).items()
        if local.trains(name, round_) and not local.personal(name)
    }


def expected_extra(
    algorithm: Algorithm, state: ServerState, client: str | None = None
) -> Mapping[str, Layout]:
    """What an update must contain besides the delta in the round after `state`."""
    return {} if algorithm.extra_layout is None else algorithm.extra_layout(state, client)


def broadcast_extra(state: ServerState, algorithm: Algorithm) -> dict[str, AdapterState]:
    """What clients receive besides the adapter in the round after `state`."""
    return {name: state.extra[name] for name in algorithm.broadcasts}


def messages_for(
    clients: Iterable[str], algorithm: Algorithm, state: ServerState, *, score: bool
) -> dict[str, Broadcast]:
    """What each client receives in the round after `state`, in the order given.

    Unless the algorithm tailors it, all clients share one object, so that a runtime can encode it
    once.
    """
    extra = broadcast_extra(state, algorithm)
    common = Broadcast(state.round + 1, state.adapter, extra, score=score, news=state.news)
    if algorithm.tailor is None:
        return dict.fromkeys(clients, common)
    return {name: algorithm.tailor(common, name) for name in clients}
