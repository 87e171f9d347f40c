"""A client's half of a round, top to bottom. It runs where the rows are.

What `train_round` returns first is all that leaves the client.
"""

import contextlib
import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path

from silotune.core.algorithm import Algorithm, LocalContext, LocalOutcome
from silotune.core.errors import DataError
from silotune.core.seeds import derive, generator
from silotune.core.tree import check_finite, size_bytes, subtract
from silotune.core.types import Broadcast, Score, Update
from silotune.data.clients import ClientRows
from silotune.federation.client_memory import ClientMemory, load_memory, save_memory
from silotune.federation.client_privacy import Ledger, OwnPlan, lots, own_plan, protected, row_guard
from silotune.federation.ledger import FILE as LEDGER
from silotune.models.allocator import release_memory
from silotune.models.loading import LoadedModel, read_adapter, untrained, write_adapter
from silotune.privacy.record_level import RowGuard
from silotune.recipes.schema import RunConfig
from silotune.training.loop import (
    build_batches,
    num_rows,
    plan_lots,
    plan_steps,
    round_lr,
    stream,
    train,
)
from silotune.training.row_gradient_check import check_row_gradients
from silotune.training.scoring import build_eval_batches, evaluate
from silotune.training.tasks.base import Batch, Example, Task


@dataclass(frozen=True)
class ClientData:
    """One client's rows, tokenised once per run."""

    name: str
    examples: tuple[Example, ...]
    eval_batches: tuple[Batch, ...]
    num_eval: int
    num_cut: int
    num_dropped: int


@dataclass(frozen=True)
class Worker:
    """What a process holds once for all clients it serves: the model, the task, the recipe."""

    loaded: LoadedModel
    task: Task
    run: RunConfig
    algorithm: Algorithm
    ledger: Ledger | None = None
    """Where releases of rows are written down; absent: in each client's own folder."""


def prepare_client(rows: ClientRows, worker: Worker) -> ClientData:
    """Tokenise a client's rows.

    Raises:
        DataError: No train or no held-out row has an answer within `train.max_length` tokens.
    """
    limit, tokenizer = worker.run.train.max_length, worker.loaded.tokenizer
    own = worker.task.prepare(rows.train, tokenizer, limit)
    held_out = worker.task.prepare(rows.evaluation, tokenizer, limit)
    for part, prepared in (("train", own), ("held-out", held_out)):
        if not prepared.examples:
            raise DataError(
                f"client '{rows.name}': no {part} row has an answer within {limit} tokens.\n"
                "  Raise train.max_length or shorten the prompts."
            )
    return ClientData(
        name=rows.name,
        examples=own.examples,
        eval_batches=tuple(
            build_eval_batches(held_out.examples, worker.task, worker.run.evaluate.batch_size)
        ),
        num_eval=len(held_out.examples),
        num_cut=own.num_cut + held_out.num_cut,
        num_dropped=own.num_dropped + held_out.num_dropped,
    )


def score(worker: Worker, data: ClientData, broadcast: Broadcast, memory: ClientMemory) -> Score:
    """Score the received adapter, with the client's personal tensors, on its held-out rows.

    Before the first round that is the base.
    """
    loaded = worker.loaded
    write_adapter(loaded, {**broadcast.adapter, **memory.tensors.get("personal", {})})
    with untrained(loaded) if broadcast.round == 1 else contextlib.nullcontext():
        return evaluate(
            loaded, data.eval_batches, worker.task, client=data.name, num_examples=data.num_eval
        )


def take_part(
    worker: Worker, data: ClientData, broadcast: Broadcast, own: Path, *, count: int | None = None
) -> Update:
    """One training message, answered: memory in, round, memory out.

    Args:
        worker: The process's model.
        data: The client's rows.
        broadcast: What the server sent.
        own: The client's own folder, where its memory lies.
        count: Rows to train on; the recipe's number when absent.

    Raises:
        UpdateError: Training ended in NaN or infinity; nothing is sent or kept.
        BudgetSpent: With record-level privacy: no budget is left for this round.
    """
    run = worker.run
    private = own_plan(run, len(data.examples), count=count)
    if private is not None:  # written down first: a crash must not hide a release
        ledger = worker.ledger or Ledger(own / LEDGER)
        seeded = run.privacy.noise == "seeded"
        ledger.begin(private, client=data.name, round_=broadcast.round, seeded=seeded)
    memory = load_memory(own, broadcast.round)
    update, memory = train_round(worker, data, broadcast, memory, count=count)
    # before the update counts: asked again after a crash, the client starts from the older memory
    oldest = broadcast.round - run.checkpoint.every
    save_memory(own, broadcast.round, memory, keep_from=oldest)
    return update


def train_round(
    worker: Worker,
    data: ClientData,
    broadcast: Broadcast,
    memory: ClientMemory,
    *,
    count: int | None = None,
) -> tuple[Update, ClientMemory]:
    """Load what was received, score it, train on fresh own rows, and return the difference.

    Args:
        worker: The process's model; its adapter tensors are overwritten.
        data: The client's rows.
        broadcast: What the server sent.
        memory: What this client kept from its last round. Not modified.
        count: Rows to train on; the recipe's number when absent.

    Returns:
        The update, and what the client keeps for its next round.

    Raises:
        UpdateError: Training ended in NaN or infinity; nothing is sent or kept.
    """
    began = time.perf_counter()
    run, rule, loaded = worker.run, worker.algorithm.local, worker.loaded
    received_score = score(worker, data, broadcast, memory) if broadcast.score else None

    private = own_plan(run, len(data.examples), count=count)
    # personal tensors are the client's own: what was received is only their first value
    personal = memory.tensors.get("personal", {})
    start = {**broadcast.adapter, **personal}
    write_adapter(loaded, start)
    context = LocalContext(
        received={name: p.detach().clone() for name, p in loaded.parameters.items()},
        extra=broadcast.extra,
        memory=memory.tensors,
    )
    if count is None:
        count = num_rows(run.train, len(data.examples))
    if private is not None and private.unit == "record":
        steps, guard = _guarded_steps(worker, data, private, round_=broadcast.round)
    else:
        guard = None
        steps = _steps(worker, data, round_=broadcast.round, start=memory.position, count=count)
    lr = round_lr(run.train, broadcast.round, run.rounds)
    whole = private is not None and private.unit == "client"
    result = train(
        loaded,
        build_batches(steps, data.examples, worker.task, packed=run.train.packing),
        worker.task,
        run.train,
        rule,
        context,
        round_=broadcast.round,
        lr=lr,
        seed=derive(run.seed, "dropout", data.name, broadcast.round),
        guard=guard,
        must_be_finite=private is None,
    )
    after = read_adapter(loaded)
    moved = subtract(after, start)
    if whole and not all(bool(t.isfinite().all()) for t in moved.values()):
        # no change, under the same noise: that training failed is told by the rows, without any
        after, moved = start, subtract(start, start)
    # here too, and not only at the server: what is wrong must not enter this client's own memory
    check_finite(moved, who=f"client '{data.name}', round {broadcast.round}")
    delta = {n: t for n, t in moved.items() if rule.trains(n, broadcast.round)}
    if private is not None and whole:  # before anything is made of it
        delta = protected(run, private, delta, client=data.name, round_=broadcast.round)
    outcome = rule.finish(delta, result.lr_sum, context) if rule.finish else LocalOutcome()
    sent = {n: t for n, t in delta.items() if not rule.personal(n)}
    kept = dict(outcome.memory)
    if own := {n: after[n] for n in delta if rule.personal(n)}:
        kept["personal"] = {**personal, **own}
    update = Update(
        client=data.name,
        round=broadcast.round,
        delta=sent,
        num_examples=len(data.examples),
        metrics={
            "train_loss": result.train_loss,
            "penalty": result.penalty,
            "lr": lr,
            "num_steps": result.num_steps,
            "num_tokens": result.num_tokens,
            "num_padded_tokens": result.num_padded_tokens,
            "num_targets": result.num_targets,
            "seconds_training": result.seconds,
            "seconds": time.perf_counter() - began,
            **({} if private is None else _mechanism(private)),
        },
        settings=dict(rule.settings),
        extra=outcome.extra,
        score=received_score,
        bytes_down=size_bytes(broadcast.adapter) + sum(map(size_bytes, broadcast.extra.values())),
        bytes_up=size_bytes(sent) + sum(map(size_bytes, outcome.extra.values())),
    )
    release_memory()  # the next client's batches have other lengths
    return update, ClientMemory(memory.position + count, kept)


def _steps(
    worker: Worker, data: ClientData, *, round_: int, start: int, count: int
) -> list[list[list[int]]]:
    """A round's rows: fresh ones, from where this client's last round ended its stream."""
    run, lengths = worker.run, [example.ids.numel() for example in data.examples]
    again = "same-samples" in run.train.compat
    flow = stream(len(data.examples), run.seed, data.name, start=0 if again else start)
    order = generator(run.seed, "order", data.name, 1 if again else round_)
    return plan_steps(list(itertools.islice(flow, count)), lengths, run.train, order)


def _guarded_steps(
    worker: Worker, data: ClientData, private: OwnPlan, *, round_: int
) -> tuple[list[list[list[int]]], RowGuard]:
    """A round's lots, each drawn from all rows in secret, and what protects them.

    Raises:
        ModelError: The gradients of single rows cannot be had in this model.
    """
    run, rule, loaded = worker.run, worker.algorithm.local, worker.loaded
    learning = {n: p for n, p in loaded.parameters.items() if rule.trains(n, round_)}
    pairs = data.examples[0].segments is not None
    check_row_gradients(loaded, worker.task, learning, pairs=pairs)
    drawn = lots(run, private, client=data.name, round_=round_)
    lengths = [example.ids.numel() for example in data.examples]
    guard = row_guard(run, private, client=data.name, round_=round_)
    return plan_lots(drawn, lengths, run.train), guard


TOLD = ("lr", "num_steps", "seconds", "seconds_training")
MECHANISM = ("noise_multiplier", "sampling_rate", "num_lots")


def withheld(update: Update) -> Update:
    """What a real client sends under [privacy]: no loss, no score and no count of its rows' tokens.

    None of them has noise. What stays follows from the recipe and the number of rows, or shows in
    the time that the message takes.
    """
    known = {key: value for key, value in update.metrics.items() if key in TOLD + MECHANISM}
    return replace(update, metrics=known, score=None)


def _mechanism(private: OwnPlan) -> dict[str, float]:
    """What a round's releases were, for whoever adds epsilons up. Tells nothing about the rows."""
    return {key: float(getattr(private, key)) for key in MECHANISM}


def cut_note(client: str, *, num_cut: int, num_dropped: int) -> str | None:
    """What became of rows that are longer than `train.max_length`; None where none is."""
    if not num_cut:
        return None
    lost = f", {num_dropped} of them with the whole answer: these are left out"
    return (
        f"{client}: {num_cut} rows are longer than train.max_length and lose their end"
        f"{lost if num_dropped else ''}"
    )
