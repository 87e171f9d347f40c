"""A client's half of a round, top to bottom. It runs where the rows are.

The update that `train_round` returns is all that leaves the client.
"""

import contextlib
import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from silotune.core.algorithm import LocalContext, LocalOutcome
from silotune.core.seeds import derive, generator
from silotune.core.tree import check_finite, size_bytes, subtract
from silotune.core.types import AdapterState, Broadcast, Score, Update
from silotune.federation.client_data import ClientData, Worker
from silotune.federation.client_memory import ClientMemory, load_memory, save_memory
from silotune.federation.client_privacy import MECHANISM, Ledger, Protection
from silotune.federation.compressed import as_sent
from silotune.federation.first_adapter import check_first_adapter
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.mixed_ranks import check_rank
from silotune.models.allocator import release_if_grown
from silotune.models.loading import read_adapter, untrained, write_adapter
from silotune.recipes.schema import RunConfig
from silotune.training.local_step import OPTIMIZER, LocalResult, OwnTraining, backward
from silotune.training.loop import (
    build_batches,
    num_rows,
    plan_lots,
    plan_steps,
    round_lr,
    stream,
    train,
)
from silotune.training.own_functions import own_loss, own_metric
from silotune.training.row_gradient_check import check_row_gradients
from silotune.training.scoring import evaluate


def score(worker: Worker, data: ClientData, broadcast: Broadcast, memory: ClientMemory) -> Score:
    """Score the received adapter, with the client's personal tensors, on its held-out rows.

    Before the first round, this scores the base.
    """
    # tokens first: where a reference belongs to them, making them needs the model as it started
    loaded, batches = worker.loaded, data.scored.batches
    total = len(batches)
    check_rank(worker.run, data.name, broadcast)
    check_first_adapter(worker.run, data.name, broadcast)
    write_adapter(loaded, {**broadcast.adapter, **memory.tensors.get("personal", {})})
    worker.progress.client_scores(data.name, 0, total)
    with untrained(loaded) if broadcast.round == 1 else contextlib.nullcontext():
        return evaluate(
            loaded,
            batches,
            worker.task,
            client=data.name,
            num_examples=data.scored.num_rows,
            tell=lambda done: worker.progress.client_scores(data.name, done, total),
            metric=own_metric(worker.run.evaluate.metric),
        )


def take_part(
    worker: Worker, data: ClientData, broadcast: Broadcast, own: Path, *, count: int | None = None
) -> Update:
    """Answer one training message: memory in, round, memory out.

    Args:
        worker: The process's model.
        data: The client's rows.
        broadcast: What the server sent.
        own: The client's own folder, which holds its memory.
        count: Rows to train on; the recipe's number when absent.

    Raises:
        UpdateError: Training ended in NaN or infinity; nothing is sent or kept.
        BudgetSpent: With privacy at the client: no budget is left for this round.
    """
    run = worker.run
    num, round_ = data.num_train, broadcast.round
    protection = Protection.of(run, client=data.name, round_=round_, num_examples=num, count=count)
    protection.begin(worker.ledger or Ledger(own / LEDGER))
    before = load_memory(own, round_)
    update, after = train_round(worker, data, broadcast, before, protection, count=count)
    return hand_in(run, update, before, after, own)


def hand_in(
    run: RunConfig, update: Update, before: ClientMemory, after: ClientMemory, own: Path
) -> Update:
    """The update as it travels, once the client has kept what it needs in its next round."""
    update, after = as_sent(run, update, before, after)
    # before the update counts: asked again after a crash, the client starts from the older memory
    save_memory(own, update.round, after, keep_from=update.round - run.checkpoint.every)
    return update


def train_round(
    worker: Worker,
    data: ClientData,
    broadcast: Broadcast,
    memory: ClientMemory,
    protection: Protection,
    *,
    count: int | None = None,
) -> tuple[Update, ClientMemory]:
    """Load what was received, score it, train on the client's next rows, and return the difference.

    Args:
        worker: The process's model; its adapter tensors are overwritten.
        data: The client's rows.
        broadcast: What the server sent.
        memory: What this client kept from its last round. Not modified.
        protection: What hides its rows in this round.
        count: Rows to train on; the recipe's number when absent.

    Returns:
        The update, and what the client keeps for its next round.

    Raises:
        UpdateError: Training ended in NaN or infinity; nothing is sent or kept.
    """
    begun = begin_round(worker, data, broadcast, memory, protection, count=count)
    result = _train(worker, begun)
    return end_round(worker, begun, result, read_adapter(worker.loaded))


@dataclass(frozen=True)
class Begun:
    """A client's round from the moment when it could train until it has."""

    data: ClientData
    broadcast: Broadcast
    memory: ClientMemory
    protection: Protection
    score: Score | None
    """Of the received adapter, if it was asked for."""
    start: AdapterState
    """What was received, with the client's personal tensors."""
    context: LocalContext
    steps: list[list[list[int]]]
    """The rows of each forward batch of each step."""
    count: int
    """Rows that are taken from the client's stream."""
    lr: float
    seconds: float
    """How long it took to come this far."""

    @property
    def optimizer(self) -> dict[str, AdapterState]:
        """What the optimizer remembers of earlier rounds."""
        return {k: t for k, t in self.memory.tensors.items() if k.startswith(OPTIMIZER)}


def begin_round(
    worker: Worker,
    data: ClientData,
    broadcast: Broadcast,
    memory: ClientMemory,
    protection: Protection,
    *,
    count: int | None = None,
) -> Begun:
    """The first half of `train_round`, until the model holds what is trained."""
    began = time.perf_counter()
    run, loaded = worker.run, worker.loaded
    check_rank(worker.run, data.name, broadcast)
    check_first_adapter(worker.run, data.name, broadcast)
    count = num_rows(run.train, data.num_train) if count is None else count
    # 1. Score what was received, before it is trained.
    received_score = score(worker, data, broadcast, memory) if broadcast.score else None
    # 2. Start from it. Personal tensors are the client's own: those received were only their start.
    personal = memory.tensors.get("personal", {})
    start = {**broadcast.adapter, **personal}
    write_adapter(loaded, start)
    context = LocalContext(
        received={name: p.detach().clone() for name, p in loaded.parameters.items()},
        extra=broadcast.extra,
        memory=memory.tensors,
    )
    # 3. Choose the rows.
    return Begun(
        data=data,
        broadcast=broadcast,
        memory=memory,
        protection=protection,
        score=received_score,
        start=start,
        context=context,
        steps=_draw_steps(worker, data, protection, start=memory.position, count=count),
        count=count,
        lr=round_lr(run.train, broadcast.round, run.rounds),
        seconds=time.perf_counter() - began,
    )


def end_round(
    worker: Worker, begun: Begun, result: LocalResult, trained: AdapterState
) -> tuple[Update, ClientMemory]:
    """The second half of `train_round`: make an update of what was trained.

    Args:
        worker: The process's model.
        begun: The client's round so far.
        result: What its training did.
        trained: The adapter after it, float32, on the CPU.
    """
    began = time.perf_counter()
    data, broadcast, memory = begun.data, begun.broadcast, begun.memory
    protection, start, context = begun.protection, begun.start, begun.context
    rule = worker.algorithm.local
    # 4. What changed, protected before anything is made of it.
    after = protection.hide_failure(trained, start)
    if rule.align is not None:
        after = rule.align(after, context, broadcast.round)
    moved = subtract(after, start)
    # here too, and not only at the server: what is wrong must not enter this client's own memory
    check_finite(moved, who=f"client '{data.name}', round {broadcast.round}")
    delta = {n: t for n, t in moved.items() if rule.trains(n, broadcast.round)}
    delta = protection.protect(delta)
    # 5. What is sent, and what stays.
    outcome = rule.finish(delta, result.lr_sum, context) if rule.finish else LocalOutcome()
    sent = {n: t for n, t in delta.items() if not rule.personal(n)}
    # a rule may train other tensors in each round: what it left alone keeps its moments
    old = begun.optimizer
    moments = {kind: {**old.get(kind, {}), **now} for kind, now in result.optimizer.items()}
    kept = {**outcome.memory, **moments}
    if own := {n: after[n] for n in delta if rule.personal(n)}:
        kept["personal"] = {**memory.tensors.get("personal", {}), **own}
    update = Update(
        client=data.name,
        round=broadcast.round,
        delta=sent,
        num_examples=data.num_train,
        metrics={**_metrics(begun, result, began=began), **protection.mechanism()},
        settings=dict(rule.settings),
        extra=outcome.extra,
        score=begun.score,
        bytes_down=size_bytes(broadcast.adapter) + sum(map(size_bytes, broadcast.extra.values())),
        bytes_up=size_bytes(sent) + sum(map(size_bytes, outcome.extra.values())),
    )
    release_if_grown()  # the next client's batches have other lengths
    return update, ClientMemory(memory.position + begun.count, kept)


def _draw_steps(
    worker: Worker, data: ClientData, protection: Protection, *, start: int, count: int
) -> list[list[list[int]]]:
    """A round's rows by step and forward batch.

    Without record-level privacy: fresh rows, from where this client's last round ended its stream.
    With it: lots, each drawn from all rows in secret.

    Raises:
        ModelError: The gradients of single rows are not available in this model.
    """
    run, round_ = worker.run, protection.round
    lengths = [example.num_positions for example in data.examples]
    if (lots := protection.lots()) is not None:
        trains = worker.algorithm.local.trains
        learning = {n: p for n, p in worker.loaded.parameters.items() if trains(n, round_)}
        pairs = any(example.segments is not None for example in data.examples[:1])
        check_row_gradients(worker.loaded, worker.task, learning, pairs=pairs)
        # the rows that cannot be used have the last numbers: they are drawn, and add nothing
        usable = [[row for row in lot if row < len(lengths)] for lot in lots]
        return plan_lots(usable, lengths, run.train)
    if not lengths:  # as many steps as with rows, so that this does not show
        num_batches = math.ceil(count / run.train.batch_size)
        return [[] for _ in range(math.ceil(num_batches / run.train.accumulation))]
    again = "same-samples" in run.train.compat
    flow = stream(len(data.examples), run.seed, data.name, start=0 if again else start)
    order = generator(run.seed, "order", data.name, 1 if again else round_)
    return plan_steps(list(itertools.islice(flow, count)), lengths, run.train, order)


def _train(worker: Worker, begun: Begun) -> LocalResult:
    """Train the loaded adapter on the round's rows, under its protection."""
    own, team = own_training(worker, begun), worker.team
    shared = contextlib.nullcontext() if team is None else team.training(begun.start)
    with shared:
        return train(
            worker.loaded,
            own.steps,
            own_loss(worker.run.train.loss, worker.task),
            worker.run.train,
            worker.algorithm.local,
            own.context,
            round_=begun.broadcast.round,
            lr=own.lr,
            seed=own.seed,
            guard=begun.protection.guard(),
            must_be_finite=own.must_be_finite,
            kept=own.kept,
            tell=own.tell,
            gradient=backward if team is None else team.backward,
        )


def own_training(worker: Worker, begun: Begun) -> OwnTraining:
    """What is this client's own in the training of the round."""
    run, progress, total = worker.run, worker.progress, len(begun.steps)
    name, task = begun.data.name, own_loss(run.train.loss, worker.task)
    parts = 1 if worker.team is None else worker.team.size
    progress.client_steps(name, 0, total, 0)
    return OwnTraining(
        steps=build_batches(
            begun.steps, begun.data.examples, task, packed=run.train.packing, parts=parts
        ),
        context=begun.context,
        lr=begun.lr,
        seed=derive(run.seed, "dropout", name, begun.broadcast.round),
        must_be_finite=begun.protection.plan is None,
        kept=begun.optimizer if worker.keeps_optimizer or run.train.keep_moments else None,
        tell=lambda done, tokens: progress.client_steps(name, done, total, tokens),
    )


def _metrics(begun: Begun, result: LocalResult, *, began: float) -> dict[str, float]:
    found: dict[str, float] = {
        "train_loss": result.train_loss,
        "penalty": result.penalty,
        "lr": begun.lr,
        "num_steps": result.num_steps,
        "num_tokens": result.num_tokens,
        "num_padded_tokens": result.num_padded_tokens,
        "num_targets": result.num_targets,
        "seconds_training": result.seconds,
        "seconds": begun.seconds + result.seconds + time.perf_counter() - began,
    }
    if result.num_together > 1:
        found["num_together"] = result.num_together
    return found


TOLD = ("lr", "num_steps")


def withheld(update: Update) -> Update:
    """What a real client sends under [privacy]: no loss, score, time or count of its rows' tokens.

    None of them has noise, and the seconds of a step say how many rows it drew, which must stay a
    secret. With secure sums, too, real clients send no such number about themselves. What remains
    follows from the recipe and the number of rows.
    """
    known = {key: value for key, value in update.metrics.items() if key in TOLD + MECHANISM}
    return replace(update, metrics=known, score=None)
