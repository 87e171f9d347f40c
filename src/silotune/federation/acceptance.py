"""What the server accepts in a round: each answer is checked before it can affect the sum."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from silotune.core.algorithm import Algorithm, expected_extra, expected_layout
from silotune.core.errors import QuorumError, UpdateError, first_line
from silotune.core.safe_text import one_line, shortened
from silotune.core.tree import (
    LARGEST,
    check_finite,
    check_representable,
    check_same_layout,
    l2_norm,
)
from silotune.core.types import (
    BUDGET_SPENT,
    Arrival,
    Failure,
    Layout,
    Score,
    ServerState,
    Settings,
    Update,
)
from silotune.core.wording import counted
from silotune.federation.compressed import as_arrived
from silotune.federation.progress import Progress
from silotune.federation.run_folder import Spool
from silotune.federation.sampling import num_needed
from silotune.privacy.secure_sum.member import threshold_of
from silotune.recipes.schema import RunConfig


@dataclass(frozen=True)
class Known:
    """What bounds the numbers that clients send: the recipe, and what they reported themselves."""

    run: RunConfig
    num_rows: Callable[[], Mapping[str, Mapping[str, int]]]
    """See `Clients`. A function, because clients may report while a round is running."""

    @property
    def num_labels(self) -> int:
        """Classes that a score has to count; 0 if nothing is classified."""
        return len(self.run.data.labels or ())

    def reported(self, client: str, part: str) -> int:
        """A client's number of rows in a part, num_train or num_eval; 0 if it has not reported."""
        return self.num_rows().get(client, {}).get(part, 0)


@dataclass(frozen=True)
class Expected:
    """What the answers of a round must be."""

    round: int
    clients: Sequence[str]
    layouts: Mapping[str, Layout]
    """The layout of each client's delta."""
    extra: Mapping[str, Mapping[str, Layout]]
    """What each client sends besides its delta, by purpose."""
    settings: Settings
    known: Known


def what_is_expected(
    algorithm: Algorithm, state: ServerState, clients: Sequence[str], known: Known
) -> Expected:
    """What `clients` must answer in the round after `state`."""
    if algorithm.layout is None:  # computed once, not for each of a thousand clients
        layouts = dict.fromkeys(clients, expected_layout(algorithm, state))
    else:
        layouts = {name: expected_layout(algorithm, state, name) for name in clients}
    extra = {name: expected_extra(algorithm, state, name) for name in clients}
    settings = algorithm.local.settings
    return Expected(state.round + 1, clients, layouts, extra, settings, known)


Accept = Callable[[Iterable[Arrival], Spool, Expected, Progress], list[Failure]]
"""(arrivals, spool, what is expected, progress) -> the clients without a usable update."""


def check_scores(scores: Iterable[Score | Failure], known: Known) -> Iterator[Score | Failure]:
    """Replace a score that cannot be right by a failure."""
    for score in scores:
        try:
            yield score if isinstance(score, Failure) else _check_score(score, known)
        except UpdateError as error:
            yield Failure(score.client, 0, "refused", str(error))


def _check_score(score: Score, known: Known) -> Score:
    """Refuse a score that counts other labels, or more than the client reported.

    Raises:
        UpdateError: The message names the client.
    """
    who, labels = f"client '{score.client}'", known.num_labels
    if len(score.label_counts) != labels:
        raise UpdateError(
            f"{who}: its score counts {len(score.label_counts)} labels, the server knows "
            f"{labels}.\n  Use the same recipe at this client."
        )
    if (score.metric is None) != (known.run.evaluate.metric is None):
        says = "contains no" if score.metric is None else "contains a"
        raise UpdateError(
            f"{who}: its score {says} metric of the recipe's evaluate.metric.\n"
            "  Use the same recipe at this client."
        )
    if (score.margin_sum is None) != (known.run.task != "prefer"):
        says = "contains no" if score.margin_sum is None else "contains a"
        raise UpdateError(
            f"{who}: its score {says} margin of pairs.\n  Use the same recipe at this client."
        )
    rows = known.reported(score.client, "num_eval")
    per_row = 1 if labels or known.run.task == "prefer" else known.run.train.max_length
    if score.num_examples > rows or score.num_tokens > rows * per_row:
        raise UpdateError(
            f"{who}: its score is over {counted(score.num_examples, 'row')} and "
            f"{counted(score.num_tokens, 'prediction')}; it reported "
            f"{counted(rows, 'held-out row')}, with at most {counted(per_row, 'prediction')} each."
            f"\n  Its score is not used. {OTHER_ROWS}"
        )
    return score


OTHER_ROWS = "If the client's rows have changed, start a new run."


def accept_updates(
    arrivals: Iterable[Arrival], spool: Spool, expected: Expected, progress: Progress
) -> list[Failure]:
    """Check each arrival, then spool it or refuse it by name. Nothing wrong reaches the sum.

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
                place = shortened(str(error))
                arrival = Failure(arrival.client, expected.round, "refused", place)
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
        The update, with the norm of its delta among its metrics, unless that is masked.

    Raises:
        UpdateError: From a client that was not asked or has answered; of a round to come; wrong
            names, shapes or dtypes; NaN, infinity or values beyond float16; no examples, or more
            than the client reported; a score that cannot be right; other constants of the local
            rule than the server's, for instance another mu.
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
    run, layout = expected.known.run, expected.layouts[update.client]
    update = replace(update, delta=as_arrived(run, update.delta, layout, who=who))
    # under masks, every word is as likely as any other, so there is nothing to see
    norm = None if expected.known.run.secure_sum.is_on else l2_norm(update.delta)
    # the guard scales whatever is finite down to its norm
    check = check_finite if expected.known.run.privacy.clips_at_server else check_representable
    # not so if any value is not finite, or larger than that
    if norm is not None and not norm <= LARGEST:
        check(update.delta, who=who)
    extra = expected.extra[update.client]
    if update.extra.keys() != extra.keys():
        raise UpdateError(
            f"{who}: sends {sorted(update.extra) or 'nothing'} besides its delta, the server's "
            f"algorithm expects {sorted(extra) or 'nothing'}.\n"
            "  Use the same recipe at this client."
        )
    for key, layout in extra.items():
        check_same_layout(update.extra[key], layout, who=f"{who}, {key}")
        check(update.extra[key], who=f"{who}, {key}")
    if update.score is not None:
        _check_score(update.score, expected.known)
    _check_weight(update, expected.known, who)
    if dict(update.settings) != dict(expected.settings):
        raise UpdateError(
            f"{who}: trained with {dict(update.settings) or 'no settings'}, the server's algorithm "
            f"has {dict(expected.settings) or 'none'}.\n  Use the same recipe at this client."
        )
    known_norm = {} if norm is None else {"delta_norm": norm}
    return replace(update, metrics={**update.metrics, **known_norm})


def _check_weight(update: Update, known: Known, who: str) -> None:
    """Refuse an update without weight, or with more than its client reported."""
    if update.num_examples < 1:
        raise UpdateError(f"{who}: no examples, so its update has no weight.\n  Check its data.")
    rows = known.reported(update.client, "num_train")
    if update.num_examples > rows:
        raise UpdateError(
            f"{who}: says that it has {counted(update.num_examples, 'training row')}; it reported "
            f"{rows}.\n  Its update is not used. {OTHER_ROWS}"
        )


def check_quorum(
    run: RunConfig, round_: int, cohort: Sequence[str], spool: Spool, failures: Sequence[Failure]
) -> str | None:
    """Stop the run if too few usable updates arrived.

    Returns:
        "privacy" where it ends well, with the adapter of the round before: so many clients have no
        privacy left to give that the others are too few. None where there are enough.

    Raises:
        QuorumError: Names the clients that are missing, and why.
    """
    needed, arrived = num_needed(run.sampling, len(cohort)), len(spool)
    if run.secure_sum.is_on:
        masked = run.secure_sum.kind == "masks"
        least = threshold_of(len(cohort)) if masked else run.secure_sum.min_cohort
        needed = max(needed, least)
    if arrived >= needed:
        return None
    spent = sum(failure.code == BUDGET_SPENT for failure in failures)
    if round_ > 1 and spent and arrived + spent >= needed:
        return "privacy"
    reasons = "\n".join(
        "  " + one_line(f"{f.client}: {f.code}: {first_line(f.place)}") for f in failures
    )
    why = f"sampling.quorum = {run.sampling.quorum:g}"
    if needed > num_needed(run.sampling, len(cohort)):
        why = "a secure sum"
    raise QuorumError(
        f"round {round_}: {arrived} usable updates of {len(cohort)}, and {why} needs {needed}."
        f"\n{reasons}\n"
        "  Fix these clients and resume: finished clients are not trained again. If the recipe\n"
        "  is at fault, start a new run with a different one."
    )
