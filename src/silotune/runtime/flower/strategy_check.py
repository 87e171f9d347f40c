"""What `silotune check` says about a Flower strategy: whether it runs, and how it differs.

A rehearsal of two rounds on small tensors, with as many clients as a round of the recipe has, finds
what would otherwise end a run after the model has been loaded and trained.
"""

import inspect

import torch

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import AlgorithmConfig
from silotune.core.errors import ConfigError
from silotune.core.types import ServerState, Update
from silotune.core.wording import counted
from silotune.recipes.algorithm import (
    FlowerStrategyConfig,
    OwnAlgorithmConfig,
    build_algorithm,
)
from silotune.runtime.flower.strategy import aggregate, in_memory, memory_or_refuse
from silotune.runtime.flower.strategy_class import builder_of, class_of, refused, text_of
from silotune.runtime.flower.strategy_memory import restore

SUMS = "it sums in float32, one reply after another; silotune passes replies in client-name order"
START = "the second moment starts at 0; in the paper it starts at tau squared"
EXPONENT = "it adds Adam's bias correction, with the exponent round + 1; the paper has none"
DISTANCES = (
    "distances are computed between full weights in float32, as |x|^2 + |y|^2 - 2xy, so small "
    "changes of large weights are lost"
)
SELECTION = "it runs Multi-Krum once; the paper repeats Krum among those not yet chosen"

TRAPS = {
    "FedAvg": (SUMS,),
    "FedAvgM": (SUMS,),
    "FedAdagrad": (START, SUMS),
    "FedYogi": (START, SUMS),
    "FedAdam": (START, EXPONENT, SUMS),
    "QFedAvg": (SUMS,),
    "MultiKrum": (DISTANCES, SUMS),
    "Krum": (DISTANCES,),
    "Bulyan": (SELECTION, DISTANCES),
    "FedMedian": (),
    "FedTrimmedAvg": (),
}
"""By class, as read in Flower 1.41; 1.42 has the same files. A user's class gets the notes of its
nearest base."""


def strategy_warnings(cfg: AlgorithmConfig) -> list[str]:
    """How a strategy differs from its paper or from our own algorithms, in one sentence each."""
    if not isinstance(cfg, FlowerStrategyConfig):
        return []
    base = _base_of(class_of(cfg))
    found = [f"Flower's {base}: {text}." for text in TRAPS.get(base, ())]
    if found and base.lower() in ALGORITHMS:
        own = f'algorithm.name = "{base.lower()}"'
        found.append(f"{own} is silotune's own {base}, without these differences.")
    memory = "A Flower strategy holds all updates of a round in memory; silotune's own hold one."
    return [*found, memory]


def _base_of(cls: type) -> str:
    """The nearest class of Flower whose aggregation a class uses; empty if it replaces all of it.

    An `aggregate_train` of its own that does not call its base's replaces it.
    """
    for base in cls.__mro__:
        if base.__module__.startswith("flwr."):
            if base.__name__ in TRAPS:
                return base.__name__
        elif (own := vars(base).get("aggregate_train")) is not None:
            code = getattr(inspect.unwrap(own), "__code__", None)
            if code is not None and "aggregate_train" not in code.co_names:
                return ""
    return ""


def check_algorithm(cfg: AlgorithmConfig, *, num_clients: int) -> None:
    """Refuse what cannot run with so many clients; rehearse two rounds of a Flower strategy.

    Args:
        cfg: The recipe's [algorithm].
        num_clients: How many clients a round of the recipe asks.

    Raises:
        ConfigError: The class cannot be imported or built, needs other messages, fails, or gives
            a different result after a stop than without one. The user's own function cannot be
            imported or called. The algorithm needs more updates than a round asks for.
    """
    if num_clients < cfg.least_updates:
        raise ConfigError(
            f"algorithm.attackers = {getattr(cfg, 'attackers', 0)} needs {cfg.least_updates} "
            f"updates in a round, which asks {counted(num_clients, 'client')}.\n"
            "  Lower it, or ask more clients per round ([sampling])."
        )
    if isinstance(cfg, OwnAlgorithmConfig):
        build_algorithm(cfg)
    if not isinstance(cfg, FlowerStrategyConfig):
        return
    build = builder_of(cfg)
    toy = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.tensor([0.5, -0.25, 2.0])}
    updates = [
        Update(
            client=f"client {i}",
            round=1,
            delta={name: t.roll(i) * 0.01 * (-1) ** i for name, t in toy.items()},
            num_examples=i,
            metrics={"train_loss": 1 / i},
        )
        for i in range(1, num_clients + 1)
    ]
    with in_memory():
        try:
            kept, stopped = build(), build()
            first = aggregate(kept, cfg, ServerState(0, toy), updates)
            memory = memory_or_refuse(kept, build(), cfg)
            restore(stopped, memory)
            state = ServerState(1, first)
            through, resumed = (aggregate(s, cfg, state, updates) for s in (kept, stopped))
        except ConfigError:
            raise
        except Exception as error:  # third-party code: whatever it raises is explained
            raise refused(
                cfg,
                f"fails in a rehearsal with {counted(num_clients, 'client')} per round: "
                f"{text_of(error)}",
                "Change [algorithm.options], ask more clients, or choose another strategy",
            ) from error
    if any(not torch.equal(t, resumed[name]) for name, t in through.items()):
        raise refused(
            cfg,
            "gives a different result after a stop than without one: it draws random numbers, or "
            "keeps memory outside its attributes",
            "Keep memory in attributes, as arrays or numbers, and draw from a seed and the round",
        )
