"""What a run is doing now, kept from the events of `Progress`, and how long it will still take.

The terminal, a log and the file behind the live page show the same view. This file prints and
writes nothing. Threads may read it while the run goes on: use `lock`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from silotune.core.types import Failure, Update
from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.federation.metrics import (
    LABEL_SCORES,
    PAIR_SCORES,
    Row,
    held_out_losses,
    overall_scores,
    own_metrics,
    part_of,
    server_losses,
    server_set,
    train_loss,
    trained,
)
from silotune.federation.progress import Progress

KEPT = 50
"""Visits to clients whose mean says how long the next will take."""
STARTING = "starting"
"""What a command does until something else is said."""
WAITING, SCORING, TRAINING, DONE, FAILED = "waiting", "scoring", "training", "done", "failed"


@dataclass
class ClientView:
    """What one client of the cohort is doing."""

    state: str = WAITING
    done: int = 0
    """Steps, or batches while it scores; so is `total`."""
    total: int = 0
    tokens: int = 0
    since: float = 0.0
    """When its training began, by the view's clock."""
    at: float = 0.0
    """When its last step was taken."""
    said: str = ""
    """What it reported, or why it failed."""

    def words(self) -> str:
        """One line, without the client's name."""
        if self.state == SCORING and self.total:
            return f"scoring, batch {self.done}/{self.total}"
        if self.state == TRAINING and self.total:
            took = self.at - self.since
            rate = f", {self.tokens / took:.0f} tokens/s" if self.tokens and took > 0 else ""
            return f"step {self.done}/{self.total}{rate}"
        return self.said or self.state


class RunView(Progress):
    """Follows a run."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Nothing has happened yet.

        Args:
            clock: Seconds, of which only differences count.
        """
        self.lock, self.clock = threading.RLock(), clock
        self.rounds = self.round = self.num_clients = 0
        self.clients: dict[str, ClientView] = {}
        """Of the present round, or of the last scoring."""
        self.stage = ""
        """What is done now, if it is not a round."""
        self.is_scoring_last = False
        """Whether the rounds are done, and all clients score."""
        self.stage_done = self.stage_total = 0
        self.stage_began = self.round_began = clock()
        self._bytes_before = self._bytes_now = 0
        self._left = _Left()

    # --- events

    def begin(self, rounds: int, first: int) -> None:  # noqa: ARG002
        """Start counting."""
        with self.lock:
            self.rounds = rounds
            self._bytes_before = self._bytes_now = 0
            self._left = _Left()

    def has_clients(self, number: int) -> None:
        """Remember how many score in the end."""
        self.num_clients = number

    def note(self, text: str) -> None:  # noqa: ARG002
        """Whatever it says: what goes on is no longer the start."""
        with self.lock:
            if self.stage == STARTING:
                self.stage = ""

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Remember it until something else begins."""
        with self.lock:
            if self.stage != what:
                self.stage_began = self.clock()
            self.stage, self.stage_done, self.stage_total = what, done, total
            self.is_scoring_last = False

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """All clients wait."""
        with self.lock:
            self.round, self.stage, self.is_scoring_last = round_, "", False
            self.clients = {name: ClientView() for name in cohort}
            self.round_began = self.clock()
            self._left.begin_round()

    def client_begins(self, client: str) -> None:
        """It is training; what exactly is told by other events."""
        with self.lock:
            self._one(client).state = TRAINING
            self._left.begin_visit(self.clock())

    def client_scores(self, client: str, done: int, total: int) -> None:
        """Count its batches."""
        with self.lock:
            self.clients[client] = ClientView(SCORING, done, total)
            self._left.score(self.clock(), done, total)

    def client_steps(self, client: str, done: int, total: int, tokens: int) -> None:
        """Count its steps."""
        with self.lock:
            now, own = self.clock(), self._one(client)
            since = now if done == 0 or own.state != TRAINING or not own.since else own.since
            self.clients[client] = ClientView(TRAINING, done, total, tokens, since, now)
            self._left.step(now, done, total)

    def client_done(self, update: Update) -> None:
        """Keep what it reports."""
        with self.lock:
            self.clients[update.client] = ClientView(DONE, said=facts(update))
            self._bytes_now += update.bytes_up + update.bytes_down
            self._left.end_visit(self.clock())

    def client_failed(self, failure: Failure) -> None:
        """Keep why."""
        with self.lock:
            self.clients[failure.client] = ClientView(FAILED, said=failure.code)
            self._left.end_visit(self.clock())

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:  # noqa: ARG002
        """Count the round's bytes, scores included."""
        with self.lock:
            sent = (int(row.get("bytes_up", 0)) + int(row.get("bytes_down", 0)) for row in rows)
            self._bytes_before, self._bytes_now = self._bytes_before + sum(sent), 0
            self._left.end_round(self.clock() - self.round_began)

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """The rounds are done."""
        with self.lock:
            self.clients = {name: ClientView() for name in clients}
            self.stage, self.stage_began = "scoring the final adapter", self.clock()
            self.is_scoring_last = True

    def client_scored(self, client: str) -> None:
        """It is done."""
        with self.lock:
            self.clients[client] = ClientView(DONE, said="scored")

    def end(self) -> None:
        """The rounds are over; what is left is to write the results."""
        with self.lock:
            self.clients, self.stage, self.stage_began = {}, "", self.clock()
            self.round, self.is_scoring_last = 0, False

    # --- what is shown

    @property
    def size_bytes(self) -> int:
        """What was sent in both directions, as far as it is known."""
        return self._bytes_before + self._bytes_now

    def seconds_left(self) -> float | None:
        """An estimate for the rounds and the last scoring; None if there is nothing to go by."""
        with self.lock:
            if self.is_scoring_last:
                waiting = sum(own.state != DONE for own in self.clients.values())
                return self._left.scoring(waiting)
            if not self.round or not self.clients:
                return None
            done = sum(own.state in (DONE, FAILED) for own in self.clients.values())
            now, num = self.clock(), len(self.clients)
            rest = self._left.rest_of_round(now, now - self.round_began, num - done, num)
            if rest is None:
                return None
            each = self._left.of_round(now - self.round_began + rest)
            scoring = self._left.scoring(self.num_clients or num) or 0.0
            return rest + each * (self.rounds - self.round) + scoring

    def headline(self) -> str:
        """The round, or what is done instead, in one line."""
        with self.lock:
            now = self.clock()
            if self.is_scoring_last:
                scored = sum(own.state == DONE for own in self.clients.values())
                first = f"{self.stage}: {scored} of {counted(len(self.clients), 'client')}"
            elif self.stage or not self.round:
                took = human_seconds(now - self.stage_began)
                count = f": {self.stage_done} of {self.stage_total}" if self.stage_total else ""
                return f"{self.stage}{count}, {took}" if self.stage else ""
            else:
                sent = f", {human_bytes(self.size_bytes)} sent" if self.size_bytes else ""
                first = f"round {self.round}/{self.rounds}{sent}"
            left = self.seconds_left()
            return first + (f", about {human_seconds(left)} left" if left is not None else "")

    def now(self) -> str:
        """The same for a log: with the client that is busy, or those that are waited for."""
        with self.lock:
            text = self.headline()
            for name, own in self.clients.items():
                if own.state in (SCORING, TRAINING) and own.total:
                    return f"{text}; {name}: {own.words()}"
            waiting = [name for name, own in self.clients.items() if own.state == WAITING]
            waiting += [name for name, own in self.clients.items() if own.state == TRAINING]
            more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
            return f"{text}; waiting for {', '.join(waiting[:3])}{more}" if waiting else text

    def round_line(self, round_: int, rows: Sequence[Row]) -> str:
        """A finished round in one line; call it after `end_round`."""
        trained_to = f": train loss {train_loss(rows):.3f}" if trained(rows) else ""
        parts = [f"round {round_}/{self.rounds} done{trained_to}"]
        labels, metrics = overall_scores(rows), own_metrics(rows)
        names = {**LABEL_SCORES, **PAIR_SCORES}
        for scored, held_out in held_out_losses(rows).items():
            accuracy = "".join(
                f", {names[key]} {value:.3f}"
                for key, value in labels.get(scored, {}).items()
                if key in ("accuracy", "preference_accuracy")
            )
            when = "before it" if scored == round_ - 1 else f"after round {scored}"
            metric = f", own metric {metrics[scored]:.3f}" if scored in metrics else ""
            parts.append(f"{part_of(rows)} loss {when}: {held_out:.3f}{accuracy}{metric}")
        for scored, loss in server_losses(rows).items():
            parts.append(f"{server_set(rows)} after round {scored}: loss {loss:.3f}")
        parts.append(f"{human_bytes(self.size_bytes)} sent so far")
        if round_ < self.rounds:
            scoring = self._left.scoring(self.num_clients) or 0.0
            left = self._left.of_round(0.0) * (self.rounds - round_) + scoring
            parts.append(f"about {human_seconds(left)} left")
        stuck = [row["client"] for row in rows if row.get("status") == "did not move"]
        if stuck:
            parts.append(f"did not move: {', '.join(stuck)}")
        return ", ".join(parts)

    def _one(self, client: str) -> ClientView:
        return self.clients.setdefault(client, ClientView())


def facts(update: Update) -> str:
    """What a client reports, in one line."""
    m = update.metrics
    sent = f"{human_bytes(update.bytes_up)} uploaded"
    if "train_loss" not in m:  # real clients send neither losses nor times under [privacy]
        return sent
    learned = f"loss {m['train_loss']:.3f}, {counted(int(m['num_tokens']), 'token')}"
    return f"{learned} in {human_seconds(m['seconds'])}, {sent}"


class _Left:
    """What rounds, visits to clients and scores have taken in this process.

    A visit is a client's part of a round, if clients train one after another in this process.
    """

    def __init__(self) -> None:
        self._rounds: list[float] = []
        self._visits: list[float] = []
        self._scores: list[float] = []
        self._visit_began: float | None = None
        self._steps_began = self._score_began = self._answered = 0.0
        self._step: tuple[float, int, int] | None = None

    def begin_round(self) -> None:
        self._visit_began = self._step = None

    def begin_visit(self, now: float) -> None:
        self._visit_began, self._step = now, None

    def score(self, now: float, done: int, total: int) -> None:
        if done == 0:
            self._score_began = now
        elif done == total:
            self._scores.append(now - self._score_began)

    def step(self, now: float, done: int, total: int) -> None:
        if done == 0:
            self._steps_began = now
        self._step = now, done, total

    def end_visit(self, now: float) -> None:
        if self._visit_began is not None:
            self._visits = [*self._visits[-KEPT:], now - self._visit_began]
            self._visit_began = self._step = None

    def end_round(self, seconds: float) -> None:
        self._rounds.append(seconds)

    def scoring(self, num_clients: int) -> float | None:
        if not self._scores:
            return None
        return num_clients * sum(self._scores) / len(self._scores)

    def of_round(self, this: float) -> float:
        """Seconds of a round: the mean of those before, else what this one will take."""
        return sum(self._rounds) / len(self._rounds) if self._rounds else this

    def rest_of_round(
        self, now: float, elapsed: float, num_left: int, num_clients: int
    ) -> float | None:
        """Seconds until the round ends; None if nothing is known yet.

        Args:
            now: The time.
            elapsed: Seconds since the round began.
            num_left: Clients that have not answered.
            num_clients: All clients of the round.
        """
        visit = self._visit()
        if self._visits or visit is not None:
            mean = sum(self._visits) / len(self._visits) if self._visits else visit or 0.0
            if self._visit_began is None:
                return num_left * mean
            spent = now - self._visit_began
            return max(0.0, (visit or mean) - spent) + max(0, num_left - 1) * mean
        if self._rounds:
            return max(0.0, self.of_round(0.0) - elapsed)
        return 0.0 if num_left < num_clients else None  # they train at the same time

    def _visit(self) -> float | None:
        """How long the present visit takes, by the steps so far; None before the first."""
        if self._visit_began is None or self._step is None or self._step[1] == 0:
            return None
        now, done, total = self._step
        return self._steps_began - self._visit_began + (now - self._steps_began) / done * total
