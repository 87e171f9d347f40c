"""The clients' half of a round for several clients at once, in one batch on one base.

For each of them it is `take_part`, except that their steps are taken side by side. Only a
simulation can do that: real clients have their own machines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.core.errors import BudgetSpent, DataError, UpdateError
from silotune.core.types import BUDGET_SPENT, Arrival, Broadcast, Failure
from silotune.data.template_limits import TemplateLimitError
from silotune.federation.client import (
    Begun,
    ClientData,
    Worker,
    begin_round,
    end_round,
    hand_in,
    own_training,
)
from silotune.federation.client_memory import load_memory
from silotune.federation.client_privacy import Ledger, Protection
from silotune.federation.ledger import FILE as LEDGER
from silotune.models.loading import read_adapter
from silotune.training.loop import check_loss
from silotune.training.own_functions import own_loss
from silotune.training.together import train_together

ROWS = (DataError, TemplateLimitError)
"""What tokenizing a client's rows may raise, when it is asked for the first time."""
UNUSABLE = "rows cannot be used"
"""Code of the failure."""


@dataclass(frozen=True)
class Asked:
    """A client that is asked to train, with everything its half of the round needs."""

    data: ClientData
    broadcast: Broadcast
    own: Path
    """The client's own folder, which holds its memory."""


def take_part_together(
    worker: Worker, group: Sequence[Asked], *, most_tokens: int | None
) -> Iterator[Arrival]:
    """Answer the training messages of a group of clients.

    Args:
        worker: The process's model.
        group: All asked in the same round.
        most_tokens: As in `train_together`.
    """
    begun: list[tuple[Asked, Begun]] = []
    for asked in group:
        try:
            begun.append((asked, _begin(worker, asked)))
        except (UpdateError, BudgetSpent, *ROWS) as error:
            yield failed(asked, error)
    if not begun:
        return
    run, round_ = worker.run, group[0].broadcast.round
    owns = [own_training(worker, own) for _, own in begun]
    trained = train_together(
        worker.loaded,
        owns,
        own_loss(run.train.loss, worker.task),
        run.train,
        worker.algorithm.local,
        round_=round_,
        most_tokens=most_tokens,
    )
    beside = read_adapter(worker.loaded)  # what is frozen beside the adapter is everyone's
    for (asked, own), training, (result, tensors) in zip(begun, owns, trained, strict=True):
        try:
            if training.must_be_finite:
                check_loss(result)
            update, after = end_round(worker, own, result, {**beside, **tensors})
        except UpdateError as error:
            yield failed(asked, error)
            continue
        yield hand_in(run, update, own.memory, after, asked.own)


def _begin(worker: Worker, asked: Asked) -> Begun:
    data, broadcast = asked.data, asked.broadcast
    protection = Protection.of(
        worker.run,
        client=data.name,
        round_=broadcast.round,
        num_examples=data.num_train,
        count=None,
    )
    protection.begin(worker.ledger or Ledger(asked.own / LEDGER))
    memory = load_memory(asked.own, broadcast.round)
    return begin_round(worker, data, broadcast, memory, protection)


def failed(asked: Asked, error: Exception) -> Failure:
    """A client whose training has failed, or may not begin."""
    code = "training failed"
    if isinstance(error, BudgetSpent):
        code = BUDGET_SPENT
    elif isinstance(error, ROWS):
        code = UNUSABLE
    return Failure(asked.data.name, asked.broadcast.round, code, str(error))
