"""What the arms of a comparison try before they are compared: the grid, as recipes.

Every arm tries all learning rates, each in two ways: a federated arm with two server steps, an arm
without a federation with an optimizer that begins again every round and with one that is kept. So
all arms get the same number of trials. A server step is a learning rate, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from silotune.recipes.schema import RunConfig

FACTOR = 3.0
"""Between the values that are tried if the recipe names none."""


@dataclass(frozen=True)
class Point:
    """One way to train an arm."""

    run: RunConfig
    values: Mapping[str, float | str]
    """What distinguishes it from the arm's other points."""
    keeps_optimizer: bool = False
    """Only without a federation: whether one optimizer serves all rounds."""

    @property
    def label(self) -> str:
        """For example "lr 0.003, server_lr 1"; also the name of its folder."""
        return words(self.values)


def words(values: Mapping[str, float | str]) -> str:
    """Chosen values in words; "as in the recipe" if nothing was chosen."""
    said = (f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in values.items())
    return ", ".join(said) or "as in the recipe"


def as_shipped(run: RunConfig) -> Point:
    """The recipe itself, untuned."""
    return Point(run, {})


def federated_points(run: RunConfig, tune: object) -> list[Point]:
    """The points of a federated arm.

    Args:
        run: The arm's recipe.
        tune: As in `CompareConfig.tune`, not false.
    """
    own = getattr(run.algorithm, "server_lr", None)
    points: list[Point] = []
    for lr in _rates(run, tune):
        tried = _with_lr(run, lr)
        if own is None:  # a Flower strategy: its options are its own
            points.append(Point(tried, {"lr": lr}))
            continue
        other = own / FACTOR if own > 1 else own * FACTOR
        for step in _given(tune).get("server_lr", (own, other)):
            algorithm = run.algorithm.model_copy(update={"server_lr": step})
            changed = tried.model_copy(update={"algorithm": algorithm})
            points.append(Point(changed, {"lr": lr, "server_lr": step}))
    return points


def lone_points(run: RunConfig, tune: object) -> list[Point]:
    """The points of an arm without a federation, as in `federated_points`."""
    return [
        Point(_with_lr(run, lr), {"lr": lr, "optimizer": way}, keeps_optimizer=way == "kept")
        for lr in _rates(run, tune)
        for way in ("restarted", "kept")
    ]


def own_points(run: RunConfig, tune: object) -> list[Point]:
    """What a client tries for its own steps: every learning rate with all steps and with half.

    The values "lr" and "steps" say how; the recipe of each point has them in [finish].
    """
    most = run.finish.local_steps
    start = run.finish.lr or run.train.lr
    rates = _given(tune).get("lr", (start, start / FACTOR, start * FACTOR))
    return [
        _own_point(run, lr, steps)
        for lr in rates
        for steps in dict.fromkeys((most, max(1, most // 2)))
    ]


def _own_point(run: RunConfig, lr: float, steps: int) -> Point:
    finish = run.finish.model_copy(update={"lr": lr, "local_steps": steps})
    return Point(run.model_copy(update={"finish": finish}), {"lr": lr, "steps": steps})


def _given(tune: object) -> Mapping[str, tuple[float, ...]]:
    return cast(Mapping[str, tuple[float, ...]], tune) if isinstance(tune, Mapping) else {}


def _rates(run: RunConfig, tune: object) -> tuple[float, ...]:
    lr = run.train.lr
    return _given(tune).get("lr", (lr, lr / FACTOR, lr * FACTOR))


def _with_lr(run: RunConfig, lr: float) -> RunConfig:
    """The recipe with another learning rate; where a schedule ends moves along."""
    scale = lr / run.train.lr
    changes = {"lr": lr, "lr_min": run.train.lr_min * scale}
    return run.model_copy(update={"train": run.train.model_copy(update=changes)})
