"""The server's test set: rows that only the server has, scored where the rounds run.

They are read like the clients' rows and scored by the same task, so their rows in metrics.jsonl
have the same columns. Nobody trains on them, and clients are not told about them. They choose a
round or the end of a run only if `evaluate.choose_by` says so: then they are no test any more, and
are called the server's validation set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from silotune.core.algorithm import Algorithm
from silotune.core.errors import DataError
from silotune.core.types import ServerState
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.data.duplicates import which_are_among
from silotune.data.reading import TaskRow
from silotune.data.server_rows import read_own_rows
from silotune.federation.metrics import SERVER_TEST, Row, server_losses, server_set
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import ServerWork, open_server_work
from silotune.models.loading import LoadedModel, write_adapter
from silotune.recipes.schema import RunConfig
from silotune.training.known_tokens import prepare_rows
from silotune.training.own_functions import own_metric
from silotune.training.scoring import build_eval_batches, evaluate, metrics
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Batch, Task


def server_test_rows(run: RunConfig) -> tuple[TaskRow, ...]:
    """The rows of `evaluate.server_path`; none without it.

    Raises:
        DataError: Files, rows or columns cannot be used.
    """
    path = run.evaluate.server_path
    return () if path is None else read_own_rows(run.data, task=run.task, path=path)


def check_server_test(
    run: RunConfig, clients: Mapping[str, ClientRows], server: Sequence[TaskRow]
) -> None:
    """Find mistakes in the server's test set before a model is loaded.

    Args:
        run: The recipe, with its labels.
        clients: The clients' rows, as far as this machine may read them.
        server: The server's own train rows.

    Raises:
        DataError: The rows cannot be read, have an unknown label, or are train rows, too.
    """
    rows = server_test_rows(run)
    trained = [row for own in clients.values() for row in own.train]
    _refuse_shared(rows, [*trained, *server], "train rows", "their score would be too good")
    if run.evaluate.choose_by == "server":
        held_out = [row for own in clients.values() for row in own.evaluation]
        _refuse_shared(rows, held_out, "held-out rows", "these must not choose a round")


def _refuse_shared(rows: Sequence[TaskRow], others: Sequence[TaskRow], what: str, why: str) -> None:
    if found := which_are_among(rows, others):
        places = ", ".join(str(n + 1) for n in found[:5]) + (", ..." if len(found) > 5 else "")
        verb = "is" if len(found) == 1 else "are"
        raise DataError(
            f"evaluate.server_path: {counted(len(found), 'row')} of {len(rows)} {verb} also among "
            f"the {what}: {why}.\n  Remove them from one of the two (numbers: {places})."
        )


@dataclass(frozen=True)
class ServerTest:
    """Scores adapters on the server's test set."""

    run: RunConfig
    loaded: LoadedModel
    task: Task
    batches: Sequence[Batch]
    num_examples: int

    def is_due(self, round_: int) -> bool:
        """Whether the adapter after a round is scored.

        `evaluate.every` decides; where it turns off the clients' scores, every round is.
        """
        return self.run.evaluate.every == 0 or self.run.evaluate.due(round_, self.run.rounds)

    def score(self, state: ServerState) -> Row:
        """Score a state's adapter; a row for metrics.jsonl."""
        write_adapter(self.loaded, state.adapter)
        found = evaluate(
            self.loaded,
            self.batches,
            self.task,
            client="",
            num_examples=self.num_examples,
            metric=own_metric(self.run.evaluate.metric),
        )
        row: Row = {"event": SERVER_TEST, "round": state.round}
        if self.run.evaluate.choose_by == "server":
            row["part"] = "validation"
        if not math.isfinite(found.loss_sum):
            return {**row, "status": "the loss is not finite"}
        return {**row, "status": "ok", **metrics([found])}


def open_server_test(run: RunConfig, loaded: LoadedModel | None = None) -> ServerTest | None:
    """Prepare the server's test set; None if the recipe has none.

    Args:
        run: The server's own recipe.
        loaded: The clients' model, if it is already in memory.

    Raises:
        DataError: No row can be scored.
    """
    if not (rows := server_test_rows(run)):
        return None
    loaded, task = loaded or load_for(run), build_task(run.task, run.data.labels, run.prefer)
    whose = "the server's test set, "
    limit, size = run.train.max_length, run.evaluate.batch_size
    examples = prepare_rows(rows, task, loaded, limit, whose=whose, batch_size=size).examples
    if not examples:
        raise DataError(
            "evaluate.server_path: no row has an answer within "
            f"{counted(run.train.max_length, 'token')}.\n  Raise train.max_length, or shorten rows."
        )
    batches = build_eval_batches(examples, task, run.evaluate.batch_size)
    return ServerTest(run, loaded, task, batches, len(examples))


@dataclass(frozen=True)
class ServerSide:
    """What the server does with rows of its own: it learns, and it scores."""

    work: ServerWork | None
    test: ServerTest | None
    folder: RunFolder
    progress: Progress

    def begin(self, state: ServerState) -> None:
        """Score the first adapter, before the first round."""
        if state.round == 0:
            self._score_once(state)

    def improve(self, state: ServerState) -> tuple[ServerState, list[Row]]:
        """What `run_rounds` calls after every aggregation: see `ServerWork.improve`."""
        state, rows = self.work.improve(state) if self.work is not None else (state, [])
        if self.test is not None and self.test.is_due(state.round):
            rows = [*rows, self.test.score(state)]
        return state, rows

    def end(self, state: ServerState) -> None:
        """Score the last adapter if `evaluate.every` did not select it."""
        self._score_once(state)

    def _score_once(self, state: ServerState) -> None:
        known = {r["round"] for r in self.folder.metrics() if r["event"] == SERVER_TEST}
        if self.test is None or state.round in known:
            return
        row = self.test.score(state)
        self.folder.append_metrics([row])
        for loss in server_losses([row]).values():
            self.progress.note(f"{server_set([row])}: loss {loss:.3f} after round {state.round}")


def open_server_side(
    run: RunConfig,
    folder: RunFolder,
    *,
    algorithm: Algorithm,
    progress: Progress,
    loaded: LoadedModel | None = None,
) -> ServerSide:
    """Prepare the server's work and its test set, as far as the recipe has them.

    Arguments and errors as in `open_server_work`.
    """
    work = open_server_work(run, folder, algorithm=algorithm, progress=progress, loaded=loaded)
    student = loaded if work is None else work.student
    return ServerSide(work, open_server_test(run, student), folder, progress)
