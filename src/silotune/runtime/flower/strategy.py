"""Any Flower strategy as a silotune algorithm.

A recipe names the class, as in "flower:flwr.serverapp.strategy.FedYogi". Each round builds a fresh
strategy, restores what it remembers, and lets it combine the clients' replies in memory; nothing is
sent. Its memory is a value in `ServerState.extra`, so a run can stop anywhere. A strategy that
sends more than the adapter and the round is refused: our clients would not read the rest.

flwr and the class are imported when a recipe is checked and when the server combines, never when
the algorithm is built: clients build it too, and must not run code that a server names.
"""

import contextlib
import gc
import hashlib
import logging
import random
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import AlgorithmConfig, weight_of
from silotune.core.algorithm import Algorithm
from silotune.core.errors import ConfigError, QuorumError
from silotune.core.tree import add, layout_of
from silotune.core.types import AdapterState, Change, ServerState, Update, Updates
from silotune.core.wording import counted
from silotune.recipes.algorithm import FlowerStrategyConfig, build_algorithm
from silotune.runtime.flower.strategy_class import builder_of, refused, text_of
from silotune.runtime.flower.strategy_memory import memory_of, restore

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy

WAIT_S = 10.0
"""Seconds after which a strategy that waits for more nodes than there are is given up."""


def algorithm_of(cfg: AlgorithmConfig) -> Algorithm:
    """The algorithm that a recipe names, our own or Flower's. Imports no strategy."""
    return _bridge(cfg) if isinstance(cfg, FlowerStrategyConfig) else build_algorithm(cfg)


def _bridge(cfg: FlowerStrategyConfig) -> Algorithm:
    def combine(state: ServerState, updates: Updates) -> Change:
        build = builder_of(cfg)
        with in_memory():
            strategy = build()
            restore(strategy, state.extra)
            after = aggregate(strategy, cfg, state, updates)
            memory = memory_or_refuse(strategy, build(), cfg)
        # float64: it holds the difference of two float32 exactly, so `step` arrives at the
        # strategy's own bits; only a weight that one round shrinks by a factor of 2^29 is rounded
        return Change({n: t.double() - state.adapter[n].double() for n, t in after.items()}, memory)

    def step(state: ServerState, change: Change) -> ServerState:
        adapter = {n: (t.double() + change.delta[n]).to(t.dtype) for n, t in state.adapter.items()}
        return ServerState(state.round + 1, adapter, change.extra)

    return Algorithm(name=cfg.name, combine=combine, step=step, linear=False)


def memory_or_refuse(
    strategy: object, fresh: object, cfg: FlowerStrategyConfig
) -> dict[str, AdapterState]:
    """What the strategy remembers, as a value."""
    try:
        return memory_of(strategy, fresh)
    except TypeError as error:
        raise refused(
            cfg,
            f"keeps memory that cannot be saved: {error}",
            "Keep numbers, arrays, lists and dicts of arrays, and ArrayRecords only",
        ) from error


def aggregate(
    strategy: "Strategy", cfg: FlowerStrategyConfig, state: ServerState, updates: Iterable[Update]
) -> dict[str, Tensor]:
    """The adapter, float32, that the strategy makes from the updates.

    Raises:
        ConfigError: It needs messages that our clients do not read, or returns other tensors.
        QuorumError: It cannot combine these updates, for instance because there are too few.
    """
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

    where = f"round {state.round + 1}: {cfg.name.rpartition('.')[2]}"
    answers = {_node_of(u.client): u for u in sorted(updates, key=lambda u: u.client)}
    sent, grid = _record(state.adapter), _nodes(list(answers), where)
    count = getattr(strategy, "weighted_by_key", "num-examples")
    loss = getattr(strategy, "train_loss_key", "train_loss")
    replies: list[Message] = []
    try:
        orders = list(strategy.configure_train(state.round + 1, sent, ConfigRecord(), grid))
        by_node = _check_messages(cfg, orders, _record(state.adapter), set(answers))
        for node, update in answers.items():
            (key,) = by_node[node].content.array_records
            facts = {
                count: int(weight_of(update, cfg)),
                loss: update.metrics.get("train_loss", 0.0),
            }
            trained = _record(add(state.adapter, update.delta))
            content = RecordDict({key: trained, "metrics": MetricRecord(facts)})
            replies.append(Message(content, reply_to=by_node[node]))
        made, _ = strategy.aggregate_train(state.round + 1, replies)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "flwr":
            raise  # a bug in the class; it stays one
        raise _no_result(where, len(answers), text_of(error)) from error
    if not made:
        raise _no_result(where, len(answers), "it returned no arrays")
    after = {name: torch.from_numpy(array.numpy()) for name, array in sorted(made.items())}
    after = {name: t.to(torch.float32) for name, t in after.items()}
    if layout_of(after) != layout_of(state.adapter):
        raise refused(cfg, "returns other tensors than it received", "Choose another strategy")
    for name, t in after.items():
        if not bool(torch.isfinite(t).all()):
            raise _no_result(where, len(answers), f"'{name}' holds NaN or infinity")
    return after


def _no_result(where: str, num: int, why: str) -> QuorumError:
    return QuorumError(
        f"{where} could not combine {counted(num, 'update')}: {why}.\n"
        "  Start a new run with more clients per round, different [algorithm.options] or another "
        "algorithm.name."
    )


def _record(state: AdapterState) -> "ArrayRecord":
    """In name order, as after saving and loading; some strategies depend on the position."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(state[name].cpu().numpy()) for name in sorted(state)})


def _node_of(client: str) -> int:
    """A client's node number: the same in every round and run."""
    return int.from_bytes(hashlib.sha256(client.encode()).digest()[:7], "big")


def _nodes(ids: list[int], where: str) -> "Grid":
    """The round's clients as Flower's `Grid`. It lists them and never sends."""
    from flwr.serverapp import Grid

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"{where} sends its own messages.\n  Choose another strategy.")

    class Nodes(Grid):
        began: float | None = None
        run = property(refuse)  # pyright: ignore[reportIncompatibleMethodOverride]
        set_run = create_message = push_messages = pull_messages = send_and_receive = refuse

        def get_node_ids(self) -> list[int]:
            self.began = self.began or time.monotonic()
            if time.monotonic() - self.began > WAIT_S:
                raise QuorumError(
                    f"{where} waits for more than {counted(len(ids), 'client')}.\n"
                    "  Ask more clients per round."
                )
            return ids

    return Nodes()


def _check_messages(
    cfg: FlowerStrategyConfig, orders: "list[Message]", sent: "ArrayRecord", nodes: set[int]
) -> "dict[int, Message]":
    """The messages by node, if they hold just the adapter and the round, and go to everyone."""
    strange: list[str] = []
    for order in orders:
        content = order.content
        keys = {key for record in content.config_records.values() for key in record}
        strange += [f"the config key '{key}'" for key in sorted(keys - {"server-round"})]
        strange += [f"the metrics '{key}'" for key in content.metric_records]
        if list(content.array_records.values()) != [sent]:
            strange.append("arrays other than the adapter")
    by_node = {order.metadata.dst_node_id: order for order in orders}
    if by_node.keys() != nodes or len(orders) != len(nodes):
        clients = counted(len(nodes), "client")
        strange.append(f"{counted(len(orders), 'message')} to {len(by_node)} of {clients}")
    if not strange:
        return by_node
    what = f"needs its own messages: it sends {', '.join(dict.fromkeys(strange))}"
    own = cfg.name.rpartition(".")[2].lower()
    if own not in ALGORITHMS:
        raise refused(cfg, what, "Choose another strategy; our clients would not read them")
    keys = ", ".join(ALGORITHMS[own][0].model_fields)
    raise refused(cfg, what, f'Use silotune\'s own: algorithm.name = "{own}", with the keys {keys}')


@contextlib.contextmanager
def in_memory() -> Iterator[None]:
    """Let Flower's code run outside its engine, quietly, and leave no trace in this process."""
    # private, the only such name here: outside the engine no `Message` can be made without it
    from flwr.supercore.task_identity import TaskIdentity

    logger, drawn = logging.getLogger("flwr"), random.getstate()  # nodes are drawn with `random`
    level = logger.level
    ids = {key: vars(TaskIdentity)[key] for key in ("_task_id", "_run_id", "_node_id")}
    logger.setLevel(logging.ERROR)
    gc.freeze()  # Flower collects garbage for every reply: 0.1 s each with a model loaded
    try:
        for key, value in ids.items():
            setattr(TaskIdentity, key, 1 if value is None else value)
        yield
    finally:
        gc.unfreeze()
        for key, value in ids.items():
            setattr(TaskIdentity, key, value)
        logger.setLevel(level)
        random.setstate(drawn)
