"""Who is there: which node is which client, and why a client cannot take part.

Nodes come and go during a run. Every new node is asked once who it is; its report either makes it
that client's node or is refused by name. Does not know rounds, and sends nothing but this question.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from silotune.core.errors import EngineError, UpdateError
from silotune.core.installed import code_sha256, version
from silotune.core.safe_text import one_line
from silotune.core.types import AWAITS_CONSENT, Failure
from silotune.federation.prepared_rows import cut_note
from silotune.federation.progress import Progress
from silotune.federation.roster import Roster
from silotune.federation.sampling import num_needed
from silotune.recipes.schema import RunConfig
from silotune.runtime import wire
from silotune.runtime.flower.mailbox import ENGINE_CODES, NOT_REACHABLE, Answer, Mailbox, Question
from silotune.runtime.flower.records import to_record
from silotune.runtime.payload import Parcel

TELL_S, TOLD = 10.0, 5
"""Seconds until a start names the clients it is waiting for, and how many of them it names."""
PARTS = ("num_train", "num_eval")
NOT_AGREED = "its people have not agreed to this run yet; it joins as soon as they do"
CONSENT_S = 20.0
"""Seconds until a client whose people have not agreed to the run yet is asked again."""
POLL_S = 0.5
"""Pause between two looks for nodes and their reports."""


class Members:
    """The clients of a run, and the nodes they have now."""

    def __init__(
        self,
        mailbox: Mailbox,
        names: Sequence[str],
        run: RunConfig,
        progress: Progress,
        *,
        base_sha256: str = "",
        roster: Roster | None = None,
    ) -> None:
        """Nobody is asked yet; see `join`. The arguments are those of `FlowerClients`."""
        self.reports: dict[str, dict[str, Any]] = {}
        """What each client has reported, by name. It stays when the client's node goes."""
        self._mailbox, self._run, self._progress = mailbox, run, progress
        self._base_sha256, self._roster = base_sha256, roster
        self._names = sorted(names)
        self._nodes: dict[str, int] = {}
        self._met: set[int] = set()  # nodes that have been asked who they are
        self._spare: dict[str, set[int]] = {}  # nodes refused because another has their name
        self._refused: dict[str, Failure] = {}
        self._consent: dict[str, tuple[int, float]] = {}  # who asks its people: node, when again

    def names(self) -> Sequence[str]:
        """All clients of the run, sorted, whether they are reachable now or not."""
        # the privacy guarantee covers only the clients that started the run
        if self._roster is None or self._run.privacy.unit != "none":
            return self._names
        return list(self._roster.nodes())

    def node_of(self, name: str) -> int | None:
        """The node a client has now; None if it cannot be asked."""
        return self._nodes.get(name)

    def why_absent(self, name: str, round_: int) -> Failure:
        """Why a client without a node cannot be asked in this round."""
        if name in self._refused:
            why = self._refused[name]
            return Failure(name, round_, why.code, why.place)
        if name in self._consent:
            return Failure(name, round_, AWAITS_CONSENT, NOT_AGREED)
        place = "its node is gone" if name in self.reports else "it has not reported"
        return Failure(name, round_, "not connected", place)

    def num_examples(self) -> dict[str, int]:
        """Number of rows in every client's train part; 0 for a client that has not reported."""
        return {name: self.reports.get(name, {}).get("num_train", 0) for name in self.names()}

    def num_rows(self) -> dict[str, dict[str, int]]:
        """num_train and num_eval of each client that has reported."""
        return {name: {key: report[key] for key in PARTS} for name, report in self.reports.items()}

    def rank_of(self, name: str) -> int:
        """The rank at which a client trains LoRA's factors; 0 for one that has not reported."""
        return self.reports.get(name, {}).get("rank", 0)

    def check_anybody(self) -> None:
        """Raise if no client has answered at all: then the engine is at fault, not a client.

        Raises:
            EngineError: Says how long the server waited.
        """
        if not self.reports and not self._refused:
            cluster = self._run.runtime.ray_address
            hint = (
                f"  Is there a Ray cluster at {cluster} (runtime.ray_address)?\n" if cluster else ""
            )
            raise EngineError(
                f"no client has reported within {self._run.runtime.join_timeout_s:g} s "
                f"(runtime.join_timeout_s).\n{hint}"
                "  See engine.log in the run folder."
            )

    # --- asking nodes who they are

    def join(self) -> None:
        """Wait until every client has reported or the time is up; the quorum decides then.

        While too few for a quorum have reported because clients wait for consent, the wait goes on.
        """
        timeout_s = self._run.runtime.join_timeout_s
        while True:
            others = self._gather(self.names(), timeout_s, newcomers_only=False)
            assert not others, "before the first round nobody is asked to train or score"
            enough = num_needed(self._run.sampling, len(self.names()))
            if not self._consent or len(self._nodes) >= enough:
                break
        missing = self._missing(self.names())
        for name in self.names():
            if name in missing and name not in self._consent:
                self._progress.note(
                    f"{name}: has not reported within {timeout_s:g} s (runtime.join_timeout_s)"
                )
            elif name in self.reports:
                found = self.reports[name]
                if (used := found["optimizer"]) not in ("", self._run.train.optimizer):
                    self._progress.note(
                        f"{name}: uses {used}, because it does not support the recipe's optimizer"
                    )
                counts = {key: found[key] for key in ("num_cut", "num_dropped")}
                if lost := cut_note(name, **counts):
                    self._progress.note(lost)

    def refresh(self, cohort: Sequence[str]) -> list[Answer]:
        """Forget nodes that are gone; if a client of the cohort has none, ask new nodes.

        Returns:
            Answers to other questions that arrived in the meantime.
        """
        online = self._mailbox.nodes()
        for name in cohort:
            if name in self._nodes and self._nodes[name] not in online:
                self._forget(name)
        if all(name in self._nodes for name in cohort):
            return []
        wait_s = min(self._run.sampling.timeout_s, self._run.runtime.join_timeout_s)
        return self._gather(cohort, wait_s, newcomers_only=True)

    def hear(self, question: Question, answer: Parcel | Failure) -> None:
        """Take a node's answer to `query`, whenever it comes."""
        if not isinstance(answer, Failure):
            self._register(question.node, answer)
            return
        self._progress.note(f"{answer.client}: {answer.code}: {answer.place}")
        if answer.code == ENGINE_CODES[NOT_REACHABLE]:
            self._met.discard(question.node)  # asked again when it is back

    def _gather(
        self, names: Sequence[str], timeout_s: float, *, newcomers_only: bool
    ) -> list[Answer]:
        """Ask nodes that are new who they are, until all of `names` have reported.

        Args:
            names: The clients to wait for.
            timeout_s: How long at most.
            newcomers_only: Wait for the nodes that are new now, not for later ones.

        Returns:
            Answers to other questions that arrived in the meantime.
        """
        began = time.monotonic()
        deadline = began + timeout_s
        asked: set[int] = set()
        others: list[Answer] = []
        nothing = to_record(Parcel({}))
        told = newcomers_only  # a round names the clients it misses anyway
        while True:
            online = self._mailbox.nodes()
            self._ask_for_consent_again(online)
            self._met &= online  # a node that comes back may have fixed why it was refused
            new = sorted(self._may_be_asked(online - self._met))[: self._mailbox.room()]
            self._met.update(new)
            asked.update(new)
            queries = [Question("query", node, f"node {node}", 0) for node in new]
            _, lost = self._mailbox.send(queries, lambda _: nothing)
            for question, answer in [*lost, *self._mailbox.take()]:
                if question.kind == "query":
                    self.hear(question, answer)
                else:  # it belongs to a round that is over; the next one names it
                    others.append((question, answer))
            missing = self._missing(names)
            unheard = self._mailbox.unanswered("query") & asked
            left = deadline - time.monotonic()
            if not missing or (newcomers_only and not unheard) or left <= 0:
                return others
            if not told and time.monotonic() - began > TELL_S:
                told = True
                some = ", ".join(missing[:TOLD]) + (", ..." if len(missing) > TOLD else "")
                self._progress.note(
                    f"waiting for {some} to report, at most {timeout_s:g} s "
                    "(runtime.join_timeout_s)"
                )
            time.sleep(min(left, POLL_S))

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._nodes and name not in self._refused]

    def _register(self, node: int, answer: Parcel) -> None:
        """Record which client a node is, or why it cannot take part."""
        said = str(answer.about.get("client", f"node {node}"))[:1000]
        # in a consortium the key decides which client this is, whatever the report says
        name = said if self._roster is None else self._roster.name_of(node) or f"node {node}"
        try:
            report = wire.decode_report(answer, name)
        except UpdateError:
            report = Failure(name, 0, "unreadable", "its report cannot be read")
        held, online = self._nodes.get(name), self._mailbox.nodes()
        problem: Failure | None = None
        if name != said:
            problem = Failure(
                name, 0, "other name", "it reports under a name that is not its key's"
            )
        elif isinstance(report, Failure):
            problem = report
        elif self._base_sha256 and report["base_sha256"] != self._base_sha256:
            place = f"its base model has the sha256 {report['base_sha256'][:12]}..."
            problem = Failure(name, 0, "other base model", place)
        elif name not in self.names():
            problem = Failure(name, 0, "unknown client", "this run has no client of that name")
        elif held is not None and held != node and held in online:
            problem = Failure(name, 0, "name taken", "another node has reported as this client")
            self._spare.setdefault(name, set()).add(node)
        elif name in self.reports and any(report[k] > self.reports[name][k] for k in PARTS):
            # else a client could come back with any weight
            place = "it reports more rows than earlier in this run; start a new run to use them"
            problem = Failure(name, 0, "more rows", place)
        if problem is not None and problem.code == AWAITS_CONSENT and name in self.names():
            if name not in self._consent:
                self._progress.note(f"{name}: {AWAITS_CONSENT}: {NOT_AGREED}")
            self._consent[name] = (node, time.monotonic() + CONSENT_S)
            self._tell_consent()
            return
        if self._consent.pop(name, None) is not None:
            self._tell_consent()
        if problem is None:
            assert not isinstance(report, Failure)
            self._refused.pop(name, None)
            self._nodes[name], self.reports[name] = node, report
            self._tell_version(name, report)
            return
        self._progress.note(f"{name}: {problem.code}: {problem.place}")
        if name in self.names() and name not in self._nodes:
            self._refused[name] = problem

    def _tell_version(self, name: str, report: Mapping[str, Any]) -> None:
        """Say it if a client runs another silotune than the server."""
        theirs, code = one_line(report["version"], longest=40), one_line(report["code_sha256"])
        if self._roster is not None:
            self._roster.saw_version(name, version=theirs, code_sha256=code)
        if theirs and theirs != version():
            self._progress.note(f"{name}: runs silotune {theirs}, the server {version()}")
        elif code and code != code_sha256():
            self._progress.note(f"{name}: runs silotune {theirs} with other files than the server")

    def _may_be_asked(self, nodes: Collection[int]) -> Collection[int]:
        """Without those of clients that this run is not for: they are not told of it."""
        roster = self._roster
        return nodes if roster is None else [node for node in nodes if roster.may_ask(node)]

    def _ask_for_consent_again(self, online: Collection[int]) -> None:
        """Have nodes asked again whose people may have agreed in the meantime."""
        for name, (node, due) in list(self._consent.items()):
            if node not in online:
                del self._consent[name]
                self._tell_consent()
            elif due <= time.monotonic():
                self._met.discard(node)
                self._consent[name] = (node, time.monotonic() + CONSENT_S)

    def _tell_consent(self) -> None:
        self._progress.waits_for_consent(sorted(self._consent))

    def _forget(self, name: str) -> None:
        """A client's node is gone; others that have reported as this client are asked again."""
        self._met -= {self._nodes.pop(name), *self._spare.pop(name, ())}
