"""A loss and a metric of a user's own, named in a recipe as "python:<module>:<function>".

Both are tried on two made-up rows when they are built, so that a wrong signature or a wrong result
is an error before anything is trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from silotune.core.errors import ConfigError
from silotune.core.own_code import import_own, refused, text_of
from silotune.models.loading import LoadedModel
from silotune.training.scoring import Metric, RowScore
from silotune.training.tasks.base import Batch, Loss, Task

LOSS, METRIC = "train.loss", "evaluate.metric"


def own_loss(name: str | None, task: Task) -> Task:
    """The task with the recipe's own loss for training, or as it is without one.

    The function takes the logits, (num_trained, classes), float32 with a graph, and the targets,
    (num_trained,), int64: tokens, or the labels of rows. It returns one loss per target,
    (num_trained,), each at least 0.

    Raises:
        ConfigError: It cannot be imported or called, or returns anything else.
    """
    if name is None:
        return task
    each = import_own(LOSS, name)
    _try_loss(name, each)

    def loss(loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
        found = task.loss(loaded, batch, attentions=attentions)
        return replace(found, loss_sum=loss_of(found.logits, batch).loss_sum)

    def loss_of(logits: Tensor, batch: Batch) -> Loss:
        targets = batch.targets.to(logits.device)
        return Loss(_losses(name, each, logits, targets).sum(), logits)

    return replace(task, loss=loss, loss_of=loss_of)


def own_metric(name: str | None) -> Metric | None:
    """The recipe's own metric, or None.

    The function takes a client's scored rows, a sequence of `RowScore`, and returns a finite
    number. Its order of rows is by length.

    Raises:
        ConfigError: It cannot be imported or called, or returns anything else.
    """
    if name is None:
        return None
    function = import_own(METRIC, name)

    def metric(rows: Sequence[RowScore]) -> float:
        found = _called(METRIC, name, function, "a client's scored rows", rows)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise refused(METRIC, name, f"returns a {type(found).__name__}", "Return a number")
        if not math.isfinite(found):
            raise refused(METRIC, name, f"returns {found}", "Return a finite number for all rows")
        return float(found)

    metric([RowScore(0.5, 2, 0, 0), RowScore(3.0, 1, 0, 1)])
    return metric


def _try_loss(name: str, each: Callable[..., object]) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    found = _losses(name, each, logits, torch.tensor([0, 2]))
    if not found.requires_grad:
        raise _wrong_loss(name, "returns a tensor without a gradient")
    if not bool((found >= 0).all()):  # NaN, too
        raise _wrong_loss(name, "returns a loss below 0")


def _losses(name: str, each: Callable[..., object], logits: Tensor, targets: Tensor) -> Tensor:
    found = _called(LOSS, name, each, "the logits and the targets", logits, targets)
    if not isinstance(found, Tensor):
        raise _wrong_loss(name, f"returns a {type(found).__name__}")
    if found.shape != targets.shape:
        raise _wrong_loss(
            name, f"returns shape {tuple(found.shape)} for targets of {tuple(targets.shape)}"
        )
    return found


def _wrong_loss(name: str, what: str) -> ConfigError:
    fix = "Return one loss of at least 0 for each target, of shape (num_trained,), with a gradient"
    return refused(LOSS, name, what, fix)


def _called(
    key: str, name: str, function: Callable[..., object], what: str, *given: object
) -> object:
    try:
        return function(*given)
    except Exception as error:  # a user's code: whatever it raises is explained
        raise refused(key, name, f"fails: {text_of(error)}", f"It is called with {what}") from error
