"""The server's side of Flower: `Clients` over the Grid, and the server app that runs the rounds.

Sampling, deadlines and quorum are silotune's own, because Flower's wait without a deadline. Every
reply is used, refused by name, or reported as late.
"""

import itertools
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from silotune.core.algorithm import keep_local
from silotune.core.errors import EngineError, SilotuneError, UpdateError
from silotune.core.tree import size_bytes
from silotune.core.types import AdapterState, Arrival, Broadcast, Failure, Score, Update
from silotune.federation.downlink import Holdings, bytes_of, with_known_first
from silotune.federation.first_adapter import start_to_send
from silotune.federation.mixed_ranks import with_client_ranks
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Progress
from silotune.federation.roster import Roster
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.federation.secure_sum import summed
from silotune.federation.server_scores import open_server_side
from silotune.recipes.schema import RunConfig
from silotune.runtime import wire
from silotune.runtime.flower.engine import measured_from
from silotune.runtime.flower.mailbox import Answer, Contents, Mailbox, Question
from silotune.runtime.flower.members import Members
from silotune.runtime.flower.records import to_record
from silotune.runtime.flower.server_reports import FileProgress, write_outcome
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.flower.submit import read_settings
from silotune.runtime.identity import write_throwaways
from silotune.runtime.job import Job, Measured
from silotune.runtime.payload import Parcel
from silotune.runtime.sum_relay import Relay
from silotune.runtime.sum_wire import decode_step

app = ServerApp()

POLL_S = (0.02, 0.5)
"""Shortest and longest pause between two looks for replies."""
POLL_SHARE = 0.01
"""Between these, a pause is this share of the time waited so far, so that pauses never make a round
longer by more than this share."""
IN_SIMULATION = 128
"""Most messages on their way at once in simulation. For every node Flower goes through all messages
on their way, so a thousand at once take minutes; more than there are actors gain nothing."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the remaining rounds, in the run folder that the run's config names."""
    told = {key: str(value) for key, value in context.run_config.items()}
    run = RunConfig.model_validate_json(told["recipe"])
    torch.set_num_threads(run.runtime.threads)
    place, settings = read_settings(told["run"])
    folder, progress = RunFolder(Path(settings["folder"]), run), FileProgress(place)
    clients = FlowerClients(
        grid,
        settings["clients"],
        run,
        progress,
        base_sha256=settings["base_sha256"],
        roster=Roster(Path(settings["members"]), only=settings.get("only"))
        if settings["members"]
        else None,
        window=IN_SIMULATION if run.runtime.name == "flower-simulation" else None,
        start=start_to_send(run, settings.get("start")),
    )
    error: BaseException | None = None
    try:
        clients.join()
        clients.members.check_anybody()
        run_remaining(clients, folder, local=settings["local"])
    except BaseException as problem:
        error = problem
        if not isinstance(problem, SilotuneError):
            traceback.print_exc()
        raise
    finally:
        write_outcome(place, clients.facts(), error)
        progress.end()


def drive_app(job: Job, *, grid: Grid) -> Measured:
    """Run a job's rounds in this process, over a Grid that somebody else's `flwr run` has opened.

    Raises:
        EngineError: A client of the run has not reported; in simulation, every client has a node.
        SilotuneError: The rounds ended with it, as in any runtime.
    """
    if job.state.round == 0:
        job.folder.save(job.state, last=False)
    clients = FlowerClients(
        grid,
        job.names,
        job.run,
        job.progress,
        base_sha256=job.base_sha256,
        window=IN_SIMULATION,
        start=start_to_send(job.run),
    )
    clients.join()
    if missing := [name for name in job.names if name not in clients.members.reports]:
        within = f"{job.run.runtime.join_timeout_s:g} s (runtime.join_timeout_s)"
        raise EngineError(
            f"no Flower node can train for {', '.join(missing)}: none reported within {within}, or "
            "it was refused for the reason given above.\n  Start one node for each client: "
            f"flwr run APP --federation-config 'num-supernodes={len(job.names)}'"
        )
    run_remaining(clients, job.folder, local=job.local)
    return measured_from(clients.facts())


def run_remaining(clients: "FlowerClients", folder: RunFolder, *, local: Collection[str]) -> None:
    """Run the remaining rounds with clients that have reported.

    Args:
        clients: The run's clients.
        folder: The run's folder, with its first adapter.
        local: Tensors that each client trains and keeps.
    """
    # only the folder's recipe knows the server's rows and choices: clients read `clients.run`
    run, progress = RunFolder.open(folder.path).run, clients.progress
    folder = RunFolder(folder.path, run)
    state = folder.load_state()
    assert state is not None, "the first adapter is saved before the engine starts"
    plain = keep_local(algorithm_of(run.algorithm), local)
    algorithm = with_privacy(plain, run, folder, clients.members.num_examples())
    algorithm = with_client_ranks(algorithm, run, clients.members.rank_of)
    if run.secure_sum.is_on:
        clients.sums = Relay(run, folder.run_id(), folder, clients.ask)
        algorithm = summed(algorithm, run, clients.sums)
        state = clients.sums.settle(state, progress)
        if run.runtime.name == "flower-simulation":
            write_throwaways(folder.path, list(clients.names()))
    folder.rewind(state.round)
    server = open_server_side(run, folder, algorithm=algorithm, progress=progress)
    progress.begin(run.rounds, state.round + 1)
    server.begin(state)
    progress.has_clients(len(clients.names()))
    last = run_rounds(
        run,
        with_known_first(run, algorithm, state),
        algorithm=algorithm,
        clients=clients,
        folder=folder,
        progress=progress,
        improve=server.improve,
    )
    server.end(last)


class FlowerClients:
    """Implements `Clients` with messages over Flower's Grid: the protocol of a round."""

    def __init__(
        self,
        grid: Grid,
        names: Sequence[str],
        run: RunConfig,
        progress: Progress,
        *,
        base_sha256: str = "",
        roster: Roster | None = None,
        window: int | None = None,
        start: AdapterState | None = None,
    ) -> None:
        """Nothing is sent yet; see `join`.

        Args:
            grid: Flower's connection to the nodes.
            names: All clients of the run.
            run: The recipe.
            progress: Told who joined.
            base_sha256: The server's base model; a client with another one is not asked.
            roster: Who is in, if clients come and go; each may report under its own name only.
            window: Most messages on their way at once; None for any number.
            start: The adapter that every client needs as its reference, if there is one.
        """
        self.run, self.progress = run, progress
        self.sums: Relay | None = None
        """Carries secure sums, if the recipe asks for them; see `run_remaining`."""
        self.holdings = Holdings(start, makes_first=self._makes_first)
        self.mailbox = Mailbox(grid, window=window)
        self.members = Members(
            self.mailbox, names, run, progress, base_sha256=base_sha256, roster=roster
        )

    def names(self) -> Sequence[str]:
        """All clients of the run, sorted, whether they are reachable now or not."""
        return self.members.names()

    def num_rows(self) -> Mapping[str, Mapping[str, int]]:
        """What each client has reported about its rows."""
        return self.members.num_rows()

    def _makes_first(self, client: str, first: str) -> bool:
        return self.members.reports.get(client, {}).get("first_sha256") == first

    def join(self) -> None:
        """Wait until every client has reported or the time is up."""
        self.progress.doing("waiting for the clients to report")
        self.members.join()

    def facts(self) -> dict[str, Any]:
        """Rows per client, and what the processes that answered report about themselves."""
        processes = list(self.mailbox.processes.values())
        return {"num_rows": self.members.num_rows(), "processes": processes}

    def train(self, messages: Mapping[str, Broadcast]) -> Iterator[Arrival]:
        """Ask clients to train; answers to earlier rounds are passed on with their round."""
        beside: Mapping[str, dict[str, Any]] = {}
        if self.sums is not None and messages:
            round_ = next(iter(messages.values())).round
            failures, beside = self.sums.begin(round_, list(messages))
            yield from failures
            messages = {name: messages[name] for name in beside}
        for answer in self._ask("train", messages, beside):
            assert not isinstance(answer, Score)
            yield answer
            del answer  # as in `Mailbox.take`

    def evaluate(self, messages: Mapping[str, Broadcast]) -> Iterator[Score | Failure]:
        """Ask clients to score the adapter."""
        for answer in self._ask("evaluate", messages):
            assert not isinstance(answer, Update)
            self.progress.client_scored(answer.client)
            yield answer

    def ask(
        self, kind: str, told: Mapping[str, dict[str, Any]]
    ) -> Iterator[tuple[str, Mapping[str, Any] | Failure]]:
        """Send each client a text of its own; yields what each answers, or why there is nothing."""
        questions: list[Question] = []
        late = self.members.refresh(list(told))
        for name, about in told.items():
            if (node := self.members.node_of(name)) is None:
                yield name, self.members.why_absent(name, about["round"])
            else:
                questions.append(Question(kind, node, name, about["round"]))
        records = {id(about): to_record(Parcel(about)) for about in told.values()}
        exchange = self._exchange(
            questions, lambda name: records[id(told[name])], self.run.sampling.timeout_s
        )
        now = {question.round for question in questions}
        for question, answer in itertools.chain(late, exchange):
            if question.kind == "query":
                self.members.hear(question, answer)
            elif question.kind != kind or question.round not in now:
                self._note_late(question)
            else:
                yield question.client, _decode_step(question, answer)

    def _note_late(self, question: Question) -> None:
        what = f"its answer to the {question.kind} message of round {question.round}"
        self.progress.note(f"{question.client}: {what} came late")

    def _ask(
        self,
        kind: str,
        messages: Mapping[str, Broadcast],
        beside: Mapping[str, dict[str, Any]] | None = None,
    ) -> Iterator[Update | Score | Failure]:
        """Send each client that is there its message, and decode what comes."""
        told, timeout_s = self.holdings.tell_all(messages), self.run.sampling.timeout_s
        # actors of a simulation serve any client and keep no adapters: counted, but sent whole
        contents = Contents(told if self.run.runtime.name == "flower" else messages, beside)
        late = self.members.refresh(list(messages))
        rounds = {broadcast.round for broadcast in messages.values()}
        questions: list[Question] = []
        for name, broadcast in messages.items():
            node = self.members.node_of(name)
            if node is None:
                yield self.members.why_absent(name, broadcast.round)
            else:
                states = (broadcast.adapter, *broadcast.extra.values())
                size, whole = bytes_of(told[name]), sum(map(size_bytes, states))
                about = (kind, node, name, broadcast.round, size, sum(map(len, states)), whole)
                questions.append(Question(*about))
        exchange = self._exchange(questions, contents.record, timeout_s)
        for question, answer in itertools.chain(late, exchange):
            if question.kind == "query":
                self.members.hear(question, answer)
            elif question.kind != kind or (
                # the rounds name late updates themselves; a score does not say its round
                kind == "evaluate" and question.round not in rounds
            ):
                self._note_late(question)
            else:
                answer = _decode(question, answer)
                asked = messages.get(question.client)
                if asked is not None and asked.round == question.round:
                    is_failure = isinstance(answer, Failure)
                    self.holdings.note(question.client, asked, answered=not is_failure)
                yield answer
            del answer  # as in `Mailbox.take`

    def _exchange(
        self,
        questions: Sequence[Question],
        record_of: Callable[[str], RecordDict],
        timeout_s: float,
    ) -> Iterator[Answer]:
        """Send, and yield answers with their questions until all have come or time is up.

        Answers to older questions come too.
        """
        began = time.monotonic()
        waiting: dict[str, Question] = {}
        unsent = list(questions)
        while waiting or unsent:
            room = self.mailbox.room()
            sent, lost = self.mailbox.send(unsent[:room], record_of)
            yield from lost
            waiting |= sent
            unsent = unsent[len(unsent) if room is None else room :]
            yield from self.mailbox.take()
            waiting = {m: q for m, q in waiting.items() if self.mailbox.is_open(m)}
            waited = time.monotonic() - began
            if waited >= timeout_s:
                break
            if waiting:
                shortest, longest = POLL_S
                pause = min(max(shortest, waited * POLL_SHARE), longest)
                time.sleep(min(timeout_s - waited, pause))
        late = f"no answer within {timeout_s:g} s (sampling.timeout_s)"
        for question in [*waiting.values(), *unsent]:
            yield question, Failure(question.client, question.round, "timeout", late)


def _decode_step(question: Question, answer: Parcel | Failure) -> Mapping[str, Any] | Failure:
    """A part of a secure sum, or why there is none."""
    try:
        said = (
            answer
            if isinstance(answer, Failure)
            else decode_step(question.kind, answer, question.client)
        )
    except UpdateError as error:
        return Failure(question.client, question.round, "unreadable", str(error)[:1000])
    return replace(said, round=question.round) if isinstance(said, Failure) else said


def _decode(question: Question, answer: Parcel | Failure) -> Update | Score | Failure:
    """An answer of the kind and round that the question asked for, or why it is not one."""
    if isinstance(answer, Failure):
        return answer
    problem = None
    try:
        said = wire.decode_answer(answer, question.client, bytes_down=question.bytes_down)
    except UpdateError as error:
        return Failure(question.client, question.round, "unreadable", str(error)[:1000])
    if isinstance(said, Failure):
        return replace(said, round=question.round)
    if isinstance(said, Score) != (question.kind == "evaluate"):
        problem = f"it is not an answer to the {question.kind} message"
    elif isinstance(said, Update) and said.round != question.round:
        problem = f"it is about round {said.round}"
    return Failure(question.client, question.round, "unreadable", problem) if problem else said
