"""The server's half of a run: THE main loop. Network, algorithm and disk are arguments."""

import time
from collections.abc import Callable

from silotune.core.algorithm import Algorithm, messages_for
from silotune.core.types import Clients, ServerState
from silotune.federation.acceptance import (
    Accept,
    Known,
    accept_updates,
    check_quorum,
    check_scores,
    what_is_expected,
)
from silotune.federation.aggregation_error import measure
from silotune.federation.budget import Clock, end_note, next_ceiling
from silotune.federation.downlink import result_of, settle
from silotune.federation.metrics import Row
from silotune.federation.outliers import check_state, refuse_outliers
from silotune.federation.progress import Progress
from silotune.federation.round_rows import round_rows, score_rows
from silotune.federation.run_folder import RunFolder
from silotune.federation.sampling import cohort_of
from silotune.recipes.schema import RunConfig

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
    accept: Accept = accept_updates,
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
        improve: What the server does with its own rows after each aggregation, see
            server_scores.py.
        accept: How answers are checked before they are spooled. Updates that nobody may read, as in
            secure sums, need other rules.
        clock: Seconds of which only differences count, the same in all processes of this machine.

    Returns:
        The state after the last round.

    Raises:
        QuorumError: Too few usable updates; what was done so far is kept and can be resumed.
        UpdateError: A round's updates lead to a state that no client could use; so is it then.
    """
    # One long function: the protocol is these seven steps. A test keeps them on one screen.
    known, part = Known(run, clients.num_rows), run.data.scored_part
    ended_by = next_ceiling(run, state, algorithm, clients.names(), folder, clock)
    while ended_by is None and state.round < run.rounds:
        r, began = state.round + 1, clock()
        # 1. Who takes part: drawn from (seed, round), so a resumed run asks the same clients.
        cohort = cohort_of(run, clients.names(), r)
        progress.begin_round(r, cohort)
        scoring = run.evaluate.due(r - 1, run.rounds)
        # 2. Let them train: the only line that may cross a network. Updates come as they arrive;
        #    those that a crash left on disk are not asked for again.
        spool = folder.spool(r)
        waiting = sorted(set(cohort) - set(spool.names()))
        arrivals = clients.train(messages_for(waiting, algorithm, state, score=scoring))
        # 3. Check one at a time, spool, compare: what cannot be combined must not touch anything.
        expected = what_is_expected(algorithm, state, waiting, known)
        failures = accept(arrivals, spool, expected, progress)
        failures += refuse_outliers(run, state, spool, progress)
        if ended_by := check_quorum(run, r, cohort, spool, failures):
            folder.save(state, last=True)
            break
        # 4. Whoever was not asked scores the adapter too, so that every curve is over all clients.
        absent = [name for name in clients.names() if name not in cohort] if scoring else []
        asked = messages_for(absent, algorithm, state, score=True)
        scores = list(check_scores(clients.evaluate(asked), known)) if absent else []
        # 5. Many deltas become one change (in name order, one in memory at a time); then the step.
        change = algorithm.combine(state, spool)
        about = measure(run, algorithm, state, spool, change)
        after = check_state(algorithm.step(state, change), spool)
        # 6. What the server does with rows of its own, where it has some: learns, and scores.
        after, own = improve(after) if improve else (after, [])
        state = settle(run, algorithm, state, after)  # as far as clients will be told
        # 7. Write it down; a crash after this line loses nothing.
        rows = round_rows(r, cohort, spool, failures, scores, about, clock() - began, part=part)
        folder.append_metrics([*own, *rows])
        ended_by = next_ceiling(run, state, algorithm, clients.names(), folder, clock)
        folder.save(state, last=r == run.rounds or ended_by is not None)
        progress.end_round(r, [*own, *rows])
    if ended_by is not None:
        progress.note(end_note(ended_by, str(state.round), run.stop))
    if run.evaluate.due(state.round, state.round):
        progress.begin_scoring(clients.names())
        folder.rewind(state.round)  # a resumed run may have scored it before
        final = messages_for(clients.names(), algorithm, result_of(state, algorithm), score=True)
        found = check_scores(clients.evaluate(final), known)
        folder.append_metrics(score_rows(state.round, found, part=part))
    return state
