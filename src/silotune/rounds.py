"""The server's half of a run: THE main loop. Network, algorithm and disk are arguments."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from silotune.algorithms.base import Algorithm, expected_extra, expected_layout
from silotune.budget import RoundCost, has_time, is_within
from silotune.config import RunConfig
from silotune.errors import QuorumError, UpdateError
from silotune.evaluate import metrics
from silotune.progress import Progress
from silotune.promise import num_released
from silotune.sampling import cohort_size, num_needed, sample
from silotune.seeds import generator
from silotune.spending import Clock, expected_seconds, seconds_spent, write_spent
from silotune.store import Row, RunFolder, Spool
from silotune.tree import check_finite, check_same_layout, l2_norm, layout_bytes, size_bytes
from silotune.types import (
    BUDGET_SPENT,
    AdapterState,
    Arrival,
    Broadcast,
    Clients,
    Failure,
    Layout,
    Score,
    ServerState,
    Settings,
    Update,
)

Improve = Callable[[ServerState], tuple[ServerState, list[Row]]]
"""(state after a round's aggregation) -> the improved state, and rows for metrics.jsonl."""


def run_rounds(
    run: RunConfig,
    state: ServerState,
    *,
    algorithm: Algorithm,
    clients: Clients,
    folder: RunFolder,
    progress: Progress,
    improve: Improve | None = None,
    clock: Clock = time.perf_counter,
) -> ServerState:
    """Run the rounds that are left, and score the last adapter.

    Args:
        run: The recipe.
        state: Where to begin: round 0 with the first adapter, or a checkpoint.
        algorithm: How many deltas become one change.
        clients: The data holders. The only argument that may cross a network.
        folder: Where updates, checkpoints and metrics go.
        progress: Told what happens; decides nothing.
        improve: What the server does on rows of its own after each aggregation, see teaching.py.
        clock: Seconds of which only differences count, the same in all processes of this machine.

    Returns:
        The state after the last round.

    Raises:
        QuorumError: Too few usable updates; what was done so far is kept and can be resumed.
    """
    num_labels = len(run.data.labels or ())
    ended_by = next_ceiling(run, state, algorithm, clients.names(), folder, clock)
    while ended_by is None and state.round < run.rounds:
        r, began = state.round + 1, clock()
        # 1. Who takes part: drawn from (seed, round), so a resumed run asks the same clients.
        cohort = sample(clients.names(), run.sampling, generator(run.seed, "sampling", r))
        progress.begin_round(r, cohort)
        scoring = run.evaluate.due(r - 1, run.rounds)
        broadcast = _broadcast(state, r, algorithm, score=scoring)
        # 2. Let them train: the only line that may cross a network. Updates come as they arrive;
        #    those that a crash left on disk are not asked for again.
        spool = folder.spool(r)
        done = set(spool.names())
        waiting = [name for name in cohort if name not in done]
        arrivals = clients.train(waiting, broadcast)
        # 3. Check one at a time, then spool: what cannot be combined must not touch anything.
        expected = what_is_expected(algorithm, state, waiting, num_labels)
        failures = accept(arrivals, spool, expected, progress)
        if ended_by := check_quorum(run, r, cohort, spool, failures):
            folder.save(state, last=True)
            break
        # 4. Whoever was not asked scores the adapter too, so that every curve is over all clients.
        absent = [name for name in clients.names() if name not in cohort] if scoring else []
        scores: list[Score | Failure] = []
        if absent:
            scores += check_scores(clients.evaluate(absent, broadcast), num_labels)
        # 5. Many deltas become one change (in name order, one in memory at a time); then the step.
        change = algorithm.combine(state, spool)
        state = algorithm.step(state, change)
        # 6. What the server learns on rows of its own, where it has some: fine-tuned or distilled.
        state, own = improve(state) if improve else (state, [])
        # 7. Write it down; a crash after this line loses nothing.
        rows = round_rows(r, cohort, spool, failures, scores, seconds=clock() - began)
        folder.append_metrics([*own, *rows])
        ended_by = next_ceiling(run, state, algorithm, clients.names(), folder, clock)
        folder.save(state, last=r == run.rounds or ended_by is not None)
        progress.end_round(r, rows)
    if ended_by is not None:
        progress.note(f"{ended_by} ends the run after round {state.round}")
    if run.evaluate.due(state.round, state.round):
        final = _broadcast(state, state.round + 1, algorithm, score=True)
        progress.begin_scoring(clients.names())
        folder.rewind(state.round)  # a resumed run may have scored it before
        found = check_scores(clients.evaluate(clients.names(), final), num_labels)
        folder.append_metrics(score_rows(state.round, found))
    return state


def next_ceiling(
    run: RunConfig,
    state: ServerState,
    algorithm: Algorithm,
    names: Sequence[str],
    folder: RunFolder,
    clock: Clock,
) -> str | None:
    """The ceiling that the next round, and the scoring of what comes of it, would go beyond.

    What was spent, and the answer, are written to the run folder.

    Returns:
        Its key, or None where there is no such ceiling, or no next round.

    Raises:
        ConfigError: Not even the first round fits below budget.bytes. That it does not fit below
            budget.hours shows only when it is done.
    """
    limit, hours, found = run.budget.bytes, run.budget.hours, None
    if run.privacy.unit != "none" and not run.privacy.is_at_client and state.round < run.rounds:
        # a round that a crash repeated was a release too
        found = "privacy" if num_released(folder) >= run.rounds else None
    if limit is None and hours is None:
        return found
    if found is None and state.round < run.rounds:
        rows, spent_s = folder.metrics(), seconds_spent(folder, clock)
        sent = sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in rows)
        cost = round_cost(run, state, algorithm, len(names))
        round_s, last_s = expected_seconds(rows) if hours is not None else (0.0, 0.0)
        if not is_within(limit, sent, cost, first=state.round == 0):
            found = "budget.bytes"
        elif state.round > 0 and not has_time(hours, spent_s, round_s=round_s, last_s=last_s):
            found = "budget.hours"
    write_spent(folder, clock, ended_by=found)
    return found


def round_cost(
    run: RunConfig, state: ServerState, algorithm: Algorithm, num_clients: int
) -> RoundCost:
    """What the round after `state` sends. Tensors are not looked at, only their sizes."""
    asked, scored = (
        cohort_size(run.sampling, num_clients),
        run.evaluate.due(state.round, run.rounds),
    )
    extra = expected_extra(algorithm, state).values()
    return RoundCost(
        down=sum(map(size_bytes, (state.adapter, *_broadcast_extra(state, algorithm).values()))),
        up=sum(map(layout_bytes, (expected_layout(algorithm, state), *extra))),
        num_asked=asked,
        num_scoring=(num_clients - asked) * scored,
        num_last=num_clients * (run.evaluate.every > 0),
    )


def _broadcast(state: ServerState, round_: int, algorithm: Algorithm, *, score: bool) -> Broadcast:
    return Broadcast(round_, state.adapter, _broadcast_extra(state, algorithm), score=score)


def _broadcast_extra(state: ServerState, algorithm: Algorithm) -> dict[str, AdapterState]:
    return {name: state.extra[name] for name in algorithm.broadcasts}


@dataclass(frozen=True)
class Expected:
    """What the answers of a round must be."""

    round: int
    clients: Sequence[str]
    layout: Layout
    extra: Mapping[str, Layout]
    settings: Settings
    num_labels: int = 0
    """Classes that a score has to count; 0 where nothing is classified."""


def what_is_expected(
    algorithm: Algorithm, state: ServerState, clients: Sequence[str], num_labels: int = 0
) -> Expected:
    """What `clients` must answer in the round after `state`."""
    layout, extra = expected_layout(algorithm, state), expected_extra(algorithm, state)
    settings = algorithm.local.settings
    return Expected(state.round + 1, clients, layout, extra, settings, num_labels)


def check_scores(scores: Iterable[Score | Failure], num_labels: int) -> Iterator[Score | Failure]:
    """Put a failure in the place of a score that counts other labels than there are."""
    for score in scores:
        if isinstance(score, Failure) or len(score.label_counts) == num_labels:
            yield score
        else:
            yield Failure(score.client, 0, "refused", _other_labels(score, num_labels))


def _other_labels(score: Score, num_labels: int) -> str:
    return (
        f"client '{score.client}': its score counts {len(score.label_counts)} labels, the server "
        f"knows {num_labels}.\n  Use the same recipe at this client."
    )


def accept(
    arrivals: Iterable[Arrival], spool: Spool, expected: Expected, progress: Progress
) -> list[Failure]:
    """Check each arrival and spool it, or refuse it by name. Nothing wrong reaches the sum.

    Returns:
        The clients without a usable update: those that a runtime reported, those refused here,
        and those that never answered.
    """
    failures: list[Failure] = []
    open_: set[str] = set(expected.clients)
    for arrival in arrivals:
        if arrival.round < expected.round:
            why = f"its answer to round {arrival.round} came after the deadline and is not used"
            arrival = Failure(arrival.client, arrival.round, "late", why)
        if isinstance(arrival, Update):
            try:
                arrival = check_update(arrival, expected, open_)
            except UpdateError as error:
                arrival = Failure(arrival.client, expected.round, "refused", str(error))
        if isinstance(arrival, Failure):
            failures.append(arrival)
            progress.client_failed(arrival)
        else:
            open_.remove(arrival.client)
            spool.add(arrival)
            progress.client_done(arrival)
        del arrival  # before the next is fetched: it may be large
    answered = {failure.client for failure in failures if failure.round == expected.round}
    for silent in sorted(open_ - answered):
        failures.append(Failure(silent, expected.round, "no answer", "the client did not answer"))
        progress.client_failed(failures[-1])
    return failures


def check_update(update: Update, expected: Expected, open_: Collection[str]) -> Update:
    """Refuse an update that cannot be combined with the others.

    Args:
        update: As it came.
        expected: What it must be.
        open_: Clients whose answer is still awaited.

    Returns:
        The update, with the norm of its delta among its metrics.

    Raises:
        UpdateError: From a client that was not asked or has answered; of a round to come; wrong
            names, shapes or dtypes; NaN or infinity; no examples; other constants of the local rule
            than the server's, for instance another mu.
    """
    who = f"client '{update.client}', round {expected.round}"
    if update.client not in open_:
        known = update.client in expected.clients
        why = "has answered already" if known else "was not asked in this round"
        raise UpdateError(f"{who}: {why}.\n  Its update is not used.")
    if update.round != expected.round:
        raise UpdateError(
            f"{who}: answers round {update.round}, the server is in round {expected.round}.\n"
            "  Its update is not used."
        )
    check_same_layout(update.delta, expected.layout, who=who)
    norm = l2_norm(update.delta)
    if not math.isfinite(norm):  # nor is it where one value is not
        check_finite(update.delta, who=who)
    if update.extra.keys() != expected.extra.keys():
        raise UpdateError(
            f"{who}: brings {sorted(update.extra) or 'nothing'} beside its delta, the server's "
            f"algorithm expects {sorted(expected.extra) or 'nothing'}.\n"
            "  Use the same recipe at this client."
        )
    for key, layout in expected.extra.items():
        check_same_layout(update.extra[key], layout, who=f"{who}, {key}")
        check_finite(update.extra[key], who=f"{who}, {key}")
    if update.score is not None and len(update.score.label_counts) != expected.num_labels:
        raise UpdateError(_other_labels(update.score, expected.num_labels))
    if update.num_examples < 1:
        raise UpdateError(f"{who}: no examples, so its update has no weight.\n  Check its data.")
    if dict(update.settings) != dict(expected.settings):
        raise UpdateError(
            f"{who}: trained with {dict(update.settings) or 'no settings'}, the server's algorithm "
            f"has {dict(expected.settings) or 'none'}.\n  Use the same recipe at this client."
        )
    return replace(update, metrics={**update.metrics, "delta_norm": norm})


def check_quorum(
    run: RunConfig, round_: int, cohort: Sequence[str], spool: Spool, failures: Sequence[Failure]
) -> str | None:
    """Stop the run when too few usable updates arrived.

    Returns:
        "privacy" where it ends well, with the adapter of the round before: so many clients have no
        privacy left to give that the others are too few. None where there are enough.

    Raises:
        QuorumError: Names the clients that are missing, and why.
    """
    needed, arrived = num_needed(run.sampling, len(cohort)), len(spool)
    if arrived >= needed:
        return None
    spent = sum(failure.code == BUDGET_SPENT for failure in failures)
    if round_ > 1 and spent and arrived + spent >= needed:
        return "privacy"
    reasons = "\n".join(f"  {f.client}: {f.code}: {first_line(f.place)}" for f in failures)
    raise QuorumError(
        f"round {round_}: {arrived} usable updates of {len(cohort)}, and sampling.quorum = "
        f"{run.sampling.quorum:g} needs {needed}.\n{reasons}\n"
        "  Mend these clients and resume: finished clients are not trained again. If the recipe\n"
        "  is at fault, start a new run with another."
    )


def first_line(text: str) -> str:
    """What happened, without how to mend it."""
    return text.split("\n", 1)[0]


# --- what is written down about a round -------------------------------------------------------


def round_rows(
    round_: int,
    cohort: Sequence[str],
    spool: Spool,
    failures: Sequence[Failure],
    scores: Sequence[Score | Failure],
    *,
    seconds: float,
) -> list[Row]:
    """A row per client that was asked, per score of the received adapter, and for the round."""
    rows: list[Row] = []
    received: list[Score | Failure] = list(scores)
    for update in spool.reports():
        rows.append(
            {
                "event": "train",
                "round": round_,
                "client": update.client,
                "status": "ok" if update.metrics["delta_norm"] > 0 else "did not move",
                "num_examples": update.num_examples,
                "bytes_down": update.bytes_down,
                "bytes_up": update.bytes_up,
                **update.metrics,
                **update.settings,
            }
        )
        if update.score is not None:
            received.append(update.score)
    for f in failures:
        row = {"event": "train", "round": round_, "client": f.client, "status": f.code}
        rows.append({**row, "place": f.place})
    rows += score_rows(round_ - 1, received)
    rows.append({"event": "round", "round": round_, "num_asked": len(cohort), "seconds": seconds})
    return rows


def score_rows(num_rounds: int, scores: Iterable[Score | Failure]) -> list[Row]:
    """Rows of held-out scores, in client-name order. `num_rounds` lie behind the scored adapter."""
    rows: list[Row] = []
    for score in sorted(scores, key=lambda s: s.client):
        row: Row = {"event": "evaluate", "round": num_rounds, "client": score.client}
        if isinstance(score, Failure):
            rows.append({**row, "status": score.code, "place": score.place})
        else:
            rows.append({**row, "status": "ok", **metrics([score]), "bytes_down": score.size_bytes})
    return rows
