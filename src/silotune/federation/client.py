"""A client's half of a round, top to bottom. It runs where the rows are.

The update that `train_round` returns is all that leaves the client.
"""

import contextlib
import itertools
import math
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from silotune.core.algorithm import LocalContext, LocalOutcome
from silotune.core.errors import DataError
from silotune.core.seeds import derive, generator
from silotune.core.tree import check_finite, size_bytes, subtract
from silotune.core.types import AdapterState, Broadcast, Score, Update
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.data.reading import TaskRow
from silotune.data.template_limits import TemplateLimitError
from silotune.federation.client_data import ClientData, ScoredTokens, TrainTokens, Worker
from silotune.federation.client_memory import ClientMemory, load_memory, save_memory
from silotune.federation.client_privacy import MECHANISM, Ledger, Protection
from silotune.federation.compressed import as_sent
from silotune.federation.first_adapter import check_first_adapter
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.mixed_ranks import check_rank
from silotune.models.allocator import release_if_grown
from silotune.models.loading import read_adapter, untrained, write_adapter
from silotune.training.known_tokens import prepare_rows
from silotune.training.local_step import OPTIMIZER
from silotune.training.loop import (
    LocalResult,
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
from silotune.training.scoring import build_eval_batches, evaluate
from silotune.training.tasks.base import Example, Prepared


def prepare_client(rows: ClientRows, worker: Worker) -> ClientData:
    """A client's rows, whose parts are tokenized when they are first needed.

    Tokenizing raises DataError if no row of the part has an answer within `train.max_length`
    tokens, and the worker may say so.
    """

    def train() -> TrainTokens:
        own = _prepare_part(rows.name, "train", rows.train, worker)
        unused = rows.num_unused + own.num_dropped if worker.counts_all else 0
        return TrainTokens(own.examples, own.num_cut, own.num_dropped, unused)

    def scored() -> ScoredTokens:
        own = _prepare_part(rows.name, "held-out", rows.scored, worker)
        unused = rows.num_unused_eval + own.num_dropped if worker.counts_all else 0
        batches = build_eval_batches(own.examples, worker.task, worker.run.evaluate.batch_size)
        return ScoredTokens(tuple(batches), len(own.examples), own.num_cut, own.num_dropped, unused)

    num_unused = (rows.num_unused, rows.num_unused_eval) if worker.counts_all else (0, 0)
    given = len(rows.train) + num_unused[0], len(rows.scored) + num_unused[1]
    return ClientData(rows.name, train, scored, num_given=given)


def _prepare_part(name: str, part: str, rows: Sequence[TaskRow], worker: Worker) -> Prepared:
    prepared = _prepare(rows, worker)
    if not prepared.examples and not worker.quiet:
        raise DataError(
            f"client '{name}': no {part} row has an answer within {worker.run.train.max_length} "
            "tokens.\n  Raise train.max_length or shorten the prompts."
        )
    return prepared


def _prepare(rows: Sequence[TaskRow], worker: Worker) -> Prepared:
    """Tokenize rows. To a quiet worker, a row for which this fails is one that is left out."""
    limit, size = worker.run.train.max_length, worker.run.evaluate.batch_size
    try:
        return prepare_rows(rows, worker.task, worker.loaded, limit, batch_size=size)
    except TemplateLimitError:
        raise  # row by row it would take as many times as long
    except Exception:  # a template is a program and can fail in any way
        if not worker.quiet:
            raise
    examples: list[Example] = []
    num_cut, error = 0, None
    for row in rows:
        try:
            one = prepare_rows([row], worker.task, worker.loaded, limit, batch_size=size)
        except TemplateLimitError:
            raise
        except Exception as problem:
            error = problem
            continue
        examples += one.examples
        num_cut += one.num_cut
    if error is not None:  # the log stays on this side
        traceback.print_exception(error, file=sys.stderr)
    return Prepared(tuple(examples), num_cut, num_dropped=len(rows) - len(examples))


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
    update, after = as_sent(run, update, before, after)
    # before the update counts: asked again after a crash, the client starts from the older memory
    save_memory(own, round_, after, keep_from=round_ - run.checkpoint.every)
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
    # One function, though a long one: it reads top to bottom, like the round itself.
    began = time.perf_counter()
    run, rule, loaded = worker.run, worker.algorithm.local, worker.loaded
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
    # 3. Train.
    lr = round_lr(run.train, broadcast.round, run.rounds)
    steps = _draw_steps(worker, data, protection, start=memory.position, count=count)
    optimizer = {k: t for k, t in memory.tensors.items() if k.startswith(OPTIMIZER)}
    result = _train(worker, data, steps, context, protection, lr=lr, optimizer=optimizer)
    # 4. What changed, protected before anything is made of it.
    after = protection.hide_failure(read_adapter(loaded), start)
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
    moments = {kind: {**optimizer.get(kind, {}), **now} for kind, now in result.optimizer.items()}
    kept = {**outcome.memory, **moments}
    if own := {n: after[n] for n in delta if rule.personal(n)}:
        kept["personal"] = {**personal, **own}
    update = Update(
        client=data.name,
        round=broadcast.round,
        delta=sent,
        num_examples=data.num_train,
        metrics={**_metrics(result, lr=lr, began=began), **protection.mechanism()},
        settings=dict(rule.settings),
        extra=outcome.extra,
        score=received_score,
        bytes_down=size_bytes(broadcast.adapter) + sum(map(size_bytes, broadcast.extra.values())),
        bytes_up=size_bytes(sent) + sum(map(size_bytes, outcome.extra.values())),
    )
    release_if_grown()  # the next client's batches have other lengths
    return update, ClientMemory(memory.position + count, kept)


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


def _train(
    worker: Worker,
    data: ClientData,
    steps: list[list[list[int]]],
    context: LocalContext,
    protection: Protection,
    *,
    lr: float,
    optimizer: Mapping[str, AdapterState],
) -> LocalResult:
    """Train the loaded adapter on these rows, under the round's protection."""
    run, progress, total = worker.run, worker.progress, len(steps)
    task = own_loss(run.train.loss, worker.task)
    progress.client_steps(data.name, 0, total, 0)
    return train(
        worker.loaded,
        build_batches(steps, data.examples, task, packed=run.train.packing),
        task,
        run.train,
        worker.algorithm.local,
        context,
        round_=protection.round,
        lr=lr,
        seed=derive(run.seed, "dropout", data.name, protection.round),
        guard=protection.guard(),
        must_be_finite=protection.plan is None,
        kept=optimizer if worker.keeps_optimizer or run.train.keep_moments else None,
        tell=lambda done, tokens: progress.client_steps(data.name, done, total, tokens),
    )


def _metrics(result: LocalResult, *, lr: float, began: float) -> dict[str, float]:
    return {
        "train_loss": result.train_loss,
        "penalty": result.penalty,
        "lr": lr,
        "num_steps": result.num_steps,
        "num_tokens": result.num_tokens,
        "num_padded_tokens": result.num_padded_tokens,
        "num_targets": result.num_targets,
        "seconds_training": result.seconds,
        "seconds": time.perf_counter() - began,
    }


TOLD = ("lr", "num_steps")


def withheld(update: Update) -> Update:
    """What a real client sends under [privacy]: no loss, score, time or count of its rows' tokens.

    None of them has noise, and the seconds of a step say how many rows it drew, which must stay a
    secret. With secure sums, too, real clients send no such number about themselves. What remains
    follows from the recipe and the number of rows.
    """
    known = {key: value for key, value in update.metrics.items() if key in TOLD + MECHANISM}
    return replace(update, metrics=known, score=None)


def cut_note(client: str, *, num_cut: int, num_dropped: int) -> str | None:
    """What happened to rows longer than `train.max_length`; None if there are none."""
    if not num_cut:
        return None
    lost = f", {num_dropped} of them left out because none of the answer remains"
    cut = counted(num_cut, "row")
    return f"{client}: {cut} truncated to train.max_length{lost if num_dropped else ''}"
