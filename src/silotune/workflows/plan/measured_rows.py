"""The rows of a plan's measured steps: the clients' own, some of them, or made-up ones."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from silotune.core.errors import DataError
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.federation.client_data import (
    ClientData,
    ScoredTokens,
    TrainTokens,
    Worker,
    known_tokens,
)
from silotune.federation.recipe_model import LOOKED_AT, warn_of_template
from silotune.federation.sampling import cohort_of
from silotune.recipes.schema import RunConfig
from silotune.runtime.inprocess import open_clients
from silotune.training.scoring import build_eval_batches
from silotune.training.tasks.base import Example
from silotune.workflows.check import check
from silotune.workflows.plan.memory import widest_batch


def measured_clients(
    run: RunConfig, worker: Worker
) -> tuple[dict[str, ClientData], tuple[str, ...] | None]:
    """The clients' rows as tokens, and what their template does to them.

    If the data set cannot be reached, made-up rows and None.
    """
    try:
        rows = check(run).rows
        template = warn_of_template(worker.loaded.tokenizer, run, rows, at_most=LOOKED_AT)
        clients, notes = some_for_all(run, rows, open_clients(rows, worker))
        return clients, (*template, *notes)
    except DataError:
        if run.partition is None or run.partition.num_clients is None:
            raise
    shape = widest_batch(run)
    example = Example(
        torch.zeros(shape.length, dtype=torch.int64),
        torch.arange(shape.length) > 0,
        label=0 if run.task == "classify" else -1,
    )
    if run.task == "prefer":
        example = Example(
            example.ids.repeat(2),
            example.trained.repeat(2),
            segments=torch.arange(2).repeat_interleave(shape.length),
            reference=torch.zeros(2),
        )
    batches = build_eval_batches(
        [example] * run.evaluate.batch_size, worker.task, run.train.batch_size
    )
    names = [f"client-{n}" for n in range(run.partition.num_clients)]
    rows = (example,) * run.train.batch_size
    tokens = TrainTokens(rows), ScoredTokens(tuple(batches), len(batches))
    return {name: known_tokens(name, *tokens) for name in names}, None


def some_for_all(
    run: RunConfig, rows: Mapping[str, ClientRows], clients: Mapping[str, ClientData]
) -> tuple[dict[str, ClientData], list[str]]:
    """The same clients; if they have many rows, only those that are asked first stand for all.

    Tokenizing fifty thousand rows takes longer than the steps that are measured. Their rows are at
    most `LOOKED_AT`, or those of one client.

    Returns:
        By name, each client's own rows or those of another one, and a note if there is another one.
    """
    asked = (name for cohort in cohorts(run, list(clients)) for name in cohort)
    chosen, num_rows = list[str](), 0
    for name in dict.fromkeys(itertools.chain(asked, clients)):
        num_rows += len(rows[name].train) + len(rows[name].scored)
        if chosen and num_rows > LOOKED_AT:
            break
        chosen.append(name)
    if len(chosen) == len(clients):
        return dict(clients), []
    others = itertools.cycle(chosen)
    found = {name: clients[name if name in chosen else next(others)] for name in clients}
    return found, [
        f"lengths of rows were looked at in {len(chosen)} of {counted(len(clients), 'client')}, "
        "and are taken to be alike in the others"
    ]


def cohorts(run: RunConfig, names: Sequence[str]) -> Iterator[list[str]]:
    """Who is asked in each round."""
    for r in range(1, run.rounds + 1):
        yield cohort_of(run, names, r)
