"""The server's side of Flower: `Clients` over the Grid, and the server app that runs the rounds.

Sampling, deadlines and quorum are ours: Flower's own wait without end. Every reply that comes is
used, refused by name, or named as late.
"""

import contextlib
import itertools
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from silotune.core.algorithm import keep_local
from silotune.core.errors import EngineError, SilotuneError, UpdateError
from silotune.core.types import Arrival, Broadcast, Failure, Score, Update
from silotune.federation.client import cut_note
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Progress
from silotune.federation.roster import Roster
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import open_server_work
from silotune.recipes.schema import RunConfig
from silotune.runtime import wire
from silotune.runtime.flower.engine import measured_from
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.flower.server_reports import FileProgress, write_outcome
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.flower.submit import read_settings
from silotune.runtime.job import Job, Measured
from silotune.runtime.payload import Parcel

app = ServerApp()

TTL_S = 30 * 86400.0
"""Flower drops a reply that is older than this, and says nothing; so it is longer than a run."""
AT_ONCE, AT_ONCE_BYTES = 16, 64e6
"""Replies fetched in one call, and bytes of them, but one in any case: so much of them is held in
memory, however many clients answer."""
TELL_S, TOLD = 10.0, 5
"""After so many seconds it is said for whom the start waits, by so many names."""
POLL_S = (0.02, 0.5)
"""Shortest and longest pause between two looks for replies."""
POLL_SHARE = 0.01
"""Between these, a pause is this share of what was waited already: no round gets longer by more."""
NOT_REACHABLE = 5
IN_SIMULATION = 128
"""Messages under way at once in simulation. For every node Flower walks through all that are under
way, so a thousand at once take it minutes; more than there are actors are of no use."""
ENGINE_CODES = {
    1: "client app not loaded",
    2: "client app failed",
    3: "message lost",
    4: "reply lost",
    5: "not reachable",
    7: "client app refused",
    8: "client app ended",
}
"""What Flower's error codes mean. Its texts are not passed on: they may hold exception texts."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that are left, in the run folder that the run's config names."""
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
        roster=Roster(Path(settings["members"])) if settings["members"] else None,
        window=IN_SIMULATION if run.runtime.name == "flower-simulation" else None,
    )
    error: BaseException | None = None
    try:
        clients.join()
        clients.check_anybody()
        go_through(clients, folder, local=settings["local"])
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
        EngineError: A client of the run has not reported; in simulation each has a node.
        SilotuneError: What ended the rounds, as in any runtime.
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
    )
    clients.join()
    if missing := [name for name in job.names if name not in clients.reports]:
        within = f"{job.run.runtime.join_timeout_s:g} s (runtime.join_timeout_s)"
        raise EngineError(
            f"no node of Flower's can train for {', '.join(missing)}: none reported within "
            f"{within}, or it was refused as said above.\n  Give it a node for each client: "
            f"flwr run APP --federation-config 'num-supernodes={len(job.names)}'"
        )
    go_through(clients, job.folder, local=job.local)
    return measured_from(clients.facts())


def go_through(clients: "FlowerClients", folder: RunFolder, *, local: Collection[str]) -> None:
    """The rounds that are left, with clients that have reported.

    Args:
        clients: Of the run.
        folder: The run's, with its first adapter.
        local: Tensors that are learned and stay at each client.
    """
    run, progress, state = clients.run, clients.progress, folder.load_state()
    assert state is not None, "the first adapter is saved before the engine starts"
    folder.rewind(state.round)
    plain = keep_local(algorithm_of(run.algorithm), local)
    algorithm = with_privacy(plain, run, folder, clients.num_examples())
    # the server's rows and teacher are named in the folder's recipe alone: clients read `run`
    own = RunFolder.open(folder.path).run
    work = open_server_work(own, folder, algorithm=algorithm, progress=progress)
    progress.begin(run.rounds, state.round + 1)
    run_rounds(
        run,
        state,
        algorithm=algorithm,
        clients=clients,
        folder=folder,
        progress=progress,
        improve=work and work.improve,
    )


@dataclass(frozen=True)
class Asked:
    """A message on its way."""

    kind: str
    """query, train or evaluate."""
    node: int
    client: str
    round: int
    bytes_down: int = 0


class FlowerClients:
    """Fulfils `Clients` with messages over Flower's Grid."""

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
    ) -> None:
        """Nothing is sent yet; see `join`.

        Args:
            grid: Flower's connection to the nodes.
            names: All clients of the run.
            run: The recipe.
            progress: Told who joined.
            base_sha256: The server's base model; a client with another is not asked.
            roster: Who is in, where clients come and go; each is believed its own name only.
            window: Messages under way at once; all when absent.
        """
        self.window, self.roster = window, roster
        self.grid, self.run, self.progress = grid, run, progress
        self.base_sha256 = base_sha256
        self.reports: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, dict[str, Any]] = {}
        self._names = sorted(names)
        self._nodes: dict[str, int] = {}
        self._met: set[int] = set()
        self._spare: dict[str, set[int]] = {}
        self._refused: dict[str, Failure] = {}
        self._open: dict[str, Asked] = {}
        self._late: list[tuple[Asked, Parcel | Failure]] = []

    def names(self) -> Sequence[str]:
        """All clients of the run, sorted, whether they are reachable now or not."""
        # what [privacy] promises is of the clients with which the run began
        if self.roster is None or self.run.privacy.unit != "none":
            return self._names
        return list(self.roster.nodes())

    def check_anybody(self) -> None:
        """Raise when no client has said a word: then the engine is at fault, not a client.

        Raises:
            EngineError: Says how long it was waited for.
        """
        if not self.reports and not self._refused:
            cluster = self.run.runtime.ray_address
            hint = (
                f"  Is there a Ray cluster at {cluster} (runtime.ray_address)?\n" if cluster else ""
            )
            raise EngineError(
                f"no client has reported within {self.run.runtime.join_timeout_s:g} s "
                f"(runtime.join_timeout_s).\n{hint}"
                "  What the engine wrote is in engine.log, in the run folder."
            )

    def num_examples(self) -> dict[str, int]:
        """Rows of every client's train part; 0 for one that has not reported yet."""
        return {name: self.reports.get(name, {}).get("num_train", 0) for name in self.names()}

    def facts(self) -> dict[str, Any]:
        """Rows per client and what the answering processes said of themselves."""
        rows = {
            name: {key: report[key] for key in ("num_train", "num_eval")}
            for name, report in self.reports.items()
        }
        return {"num_rows": rows, "processes": list(self.processes.values())}

    # --- who is there

    def join(self) -> None:
        """Wait until every client has reported, or the time is up; the quorum decides then."""
        timeout_s = self.run.runtime.join_timeout_s
        self._gather(self.names(), timeout_s, newcomers_only=False)
        for name in self.names():
            if name not in self._nodes and name not in self._refused:
                self.progress.note(
                    f"{name}: has not reported within {timeout_s:g} s (runtime.join_timeout_s)"
                )
            elif name in self.reports:
                found = self.reports[name]
                if (used := found["optimizer"]) not in ("", self.run.train.optimizer):
                    self.progress.note(f"{name}: has not the recipe's optimizer and uses {used}")
                counts = {key: found[key] for key in ("num_cut", "num_dropped")}
                if lost := cut_note(name, **counts):
                    self.progress.note(lost)

    def _gather(self, names: Sequence[str], timeout_s: float, *, newcomers_only: bool) -> None:
        """Ask nodes that are new who they are, until all of `names` have reported.

        Args:
            names: Who is missed.
            timeout_s: How long at most.
            newcomers_only: Wait for the nodes that are new now, not for further ones.
        """
        began = time.monotonic()
        deadline = began + timeout_s
        asked: set[int] = set()
        told = newcomers_only  # of these a round says itself whom it misses
        while True:
            online = set(self.grid.get_node_ids())
            self._met &= online  # whoever comes back may have mended why it was refused
            new = sorted(online - self._met)[: self._room()]
            self._met.update(new)
            asked.update(new)
            queries = [Asked("query", node, f"node {node}", 0) for node in new]
            _, lost = self._send(queries, to_record(Parcel({})))
            for question, answer in [*lost, *self._take()]:
                if question.kind == "query":
                    self._hear(question, answer)
                else:  # to a round that is over; the next one names it
                    self._late.append((question, answer))
            all_there = all(name in self._nodes or name in self._refused for name in names)
            unheard = {q.node for q in self._open.values() if q.kind == "query"} & asked
            left = deadline - time.monotonic()
            if all_there or (newcomers_only and not unheard) or left <= 0:
                return
            if not told and time.monotonic() - began > TELL_S:
                told = True
                missing = [n for n in names if n not in self._nodes and n not in self._refused]
                some = ", ".join(missing[:TOLD]) + (", ..." if len(missing) > TOLD else "")
                self.progress.note(
                    f"waiting for {some} to report, at most {timeout_s:g} s "
                    "(runtime.join_timeout_s)"
                )
            time.sleep(min(left, POLL_S[1]))

    def _hear(self, question: Asked, answer: Parcel | Failure) -> None:
        """Take a node's report, whenever it comes."""
        if not isinstance(answer, Failure):
            self._register(question.node, answer)
            return
        self.progress.note(f"{answer.client}: {answer.code}: {answer.place}")
        if answer.code == ENGINE_CODES[NOT_REACHABLE]:
            self._met.discard(question.node)  # asked again when it is back

    def _register(self, node: int, answer: Parcel) -> None:
        """Note who answered, or why it cannot take part."""
        said = str(answer.about.get("client", f"node {node}"))[:1000]
        # a consortium knows by the key who this is, whatever it says of itself
        name = said if self.roster is None else self.roster.name_of(node) or f"node {node}"
        try:
            report = wire.decode_report(answer, name)
        except UpdateError:
            report = Failure(name, 0, "unreadable", "its report cannot be read")
        held, online = self._nodes.get(name), set(self.grid.get_node_ids())
        problem: Failure | None = None
        if name != said:
            problem = Failure(name, 0, "other name", "it reports by another than its key's")
        elif isinstance(report, Failure):
            problem = report
        elif self.base_sha256 and report["base_sha256"] != self.base_sha256:
            place = f"its base model has the sha256 {report['base_sha256'][:12]}..."
            problem = Failure(name, 0, "other base model", place)
        elif name not in self.names():
            problem = Failure(name, 0, "unknown client", "this run has no client of that name")
        elif held is not None and held != node and held in online:
            problem = Failure(name, 0, "name taken", "another node has reported as this client")
            self._spare.setdefault(name, set()).add(node)
        if problem is None:
            assert not isinstance(report, Failure)
            self._refused.pop(name, None)
            self._nodes[name], self.reports[name] = node, report
            return
        self.progress.note(f"{name}: {problem.code}: {problem.place}")
        if name in self.names() and name not in self._nodes:
            self._refused[name] = problem

    def _forget(self, name: str) -> None:
        """A client's node is gone; another that has reported as this client is asked again."""
        self._met -= {self._nodes.pop(name), *self._spare.pop(name, ())}

    # --- the protocol

    def train(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Arrival]:
        """Ask the cohort to train; answers to earlier rounds are passed on with their round."""
        for answer in self._ask("train", cohort, broadcast):
            assert not isinstance(answer, Score)
            yield answer
            del answer  # as in `_take`

    def evaluate(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Score | Failure]:
        """Ask the cohort to score the adapter."""
        for answer in self._ask("evaluate", cohort, broadcast):
            assert not isinstance(answer, Update)
            yield answer

    def _ask(
        self, kind: str, cohort: Sequence[str], broadcast: Broadcast
    ) -> Iterator[Update | Score | Failure]:
        """Send one parcel to all, and decode what comes."""
        parcel, timeout_s = wire.encode_broadcast(broadcast), self.run.sampling.timeout_s
        here = set(self.grid.get_node_ids())
        for name in cohort:
            if name in self._nodes and self._nodes[name] not in here:
                self._forget(name)
        if any(name not in self._nodes for name in cohort):
            wait_s = min(timeout_s, self.run.runtime.join_timeout_s)
            self._gather(cohort, wait_s, newcomers_only=True)
        questions: list[Asked] = []
        for name in cohort:
            if name in self._nodes:
                size = parcel.values.nbytes
                questions.append(Asked(kind, self._nodes[name], name, broadcast.round, size))
            elif name in self._refused:
                why = self._refused[name]
                yield Failure(name, broadcast.round, why.code, why.place)
            else:
                place = "its node is gone" if name in self.reports else "it has not reported"
                yield Failure(name, broadcast.round, "not connected", place)
        late, self._late = self._late, []
        exchange = self._exchange(questions, parcel, timeout_s)
        for question, answer in itertools.chain(late, exchange):
            if question.kind == "query":
                self._hear(question, answer)
            elif question.kind != kind or (
                # the rounds name late updates themselves; a score does not say its round
                kind == "evaluate" and question.round != broadcast.round
            ):
                what = f"its answer to the {question.kind} message of round {question.round}"
                self.progress.note(f"{question.client}: {what} came late")
            else:
                yield _decode(question, answer)
            del answer  # as in `_take`

    def _exchange(
        self, questions: Sequence[Asked], parcel: Parcel, timeout_s: float
    ) -> Iterator[tuple[Asked, Parcel | Failure]]:
        """Send, and yield answers with their questions until all have come or time is up.

        Answers to older questions come too.
        """
        began, content = time.monotonic(), to_record(parcel)
        waiting: dict[str, Asked] = {}
        unsent = list(questions)
        while waiting or unsent:
            room = self._room()
            sent, lost = self._send(unsent[:room], content)
            yield from lost
            waiting |= sent
            unsent = unsent[len(unsent) if room is None else room :]
            yield from self._take()
            waiting = {m: q for m, q in waiting.items() if m in self._open}
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

    def _room(self) -> int | None:
        """How many messages may be sent now; None for any number."""
        return None if self.window is None else max(0, self.window - len(self._open))

    def _send(
        self, questions: Sequence[Asked], content: RecordDict
    ) -> tuple[dict[str, Asked], list[tuple[Asked, Failure]]]:
        """Send one content to many: the questions by message, and those that could not be sent."""
        messages = [
            Message(content, q.node, q.kind, ttl=TTL_S, group_id=str(q.round)) for q in questions
        ]
        # Flower returns nothing when it could send nothing, and None for one that it could not
        ids: list[str | None] = list(self.grid.push_messages(messages)) or [None] * len(questions)
        pairs = list(zip(ids, questions, strict=True))
        sent = {message: question for message, question in pairs if message}
        self._open.update(sent)
        return sent, [(q, _engine_failure(q, 3)) for message, q in pairs if not message]

    def _take(self) -> Iterator[tuple[Asked, Parcel | Failure]]:
        """What has arrived, a few at a time, each with the question that it answers."""
        ids = list(self._open)
        # an answer is about as large as its question
        largest = max((question.bytes_down for question in self._open.values()), default=0)
        some = max(1, min(AT_ONCE, int(AT_ONCE_BYTES // max(largest, 1))))
        for at in range(0, len(ids), some):
            for reply in self.grid.pull_messages(ids[at : at + some]):
                question = self._open.pop(reply.metadata.reply_to_message_id, None)
                if question is not None:  # else it has been read before
                    yield question, self._read(reply, question)
            reply = None  # let go of before the next is fetched: it may be large

    def _read(self, reply: Message, question: Asked) -> Parcel | Failure:
        if reply.has_error():
            return _engine_failure(question, reply.error.code)
        try:
            parcel = from_record(reply.content)
        except UpdateError as error:
            return Failure(question.client, question.round, "unreadable", str(error))
        with contextlib.suppress(UpdateError):
            process = wire.decode_process(parcel)
            self.processes[process["id"]] = process
        return parcel


def _decode(question: Asked, answer: Parcel | Failure) -> Update | Score | Failure:
    """An answer of the kind and round that was asked for, or why it is none."""
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
        problem = f"it is no answer to the {question.kind} message"
    elif isinstance(said, Update) and said.round != question.round:
        problem = f"it speaks of round {said.round}"
    return Failure(question.client, question.round, "unreadable", problem) if problem else said


def _engine_failure(question: Asked, code: int) -> Failure:
    meaning = ENGINE_CODES.get(code, "engine error")
    return Failure(question.client, question.round, meaning, f"Flower's error code {code}")
