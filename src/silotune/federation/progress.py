"""What a person sees while a run goes on: a live table in a terminal, else plain lines; on stderr.

Progress is told what happens and decides nothing; the base class keeps silent.
"""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from silotune.core.types import Failure, Update
from silotune.core.wording import human_bytes, human_seconds
from silotune.federation.metrics import Row, held_out_losses, overall_scores, train_loss, trained


class Progress:
    """Silent. Subclasses show."""

    def begin(self, rounds: int, first: int) -> None:
        """A run begins, or goes on, with round `first` of `rounds`."""

    def note(self, text: str) -> None:
        """A step outside the rounds, for instance loading the base model."""

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """A round begins."""

    def client_begins(self, client: str) -> None:
        """A client begins to train. Only a runtime that sees it says so."""

    def client_done(self, update: Update) -> None:
        """A client's update was accepted."""

    def client_failed(self, failure: Failure) -> None:
        """A client delivered nothing usable."""

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """A round is written down."""

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """All clients score the last adapter."""

    def end(self) -> None:
        """Nothing more will come; also after an error."""


class Both(Progress):
    """Tells two progresses the same."""

    def __init__(self, one: Progress, other: Progress) -> None:
        self.both = (one, other)

    def begin(self, rounds: int, first: int) -> None:
        """Tell both."""
        for each in self.both:
            each.begin(rounds, first)

    def note(self, text: str) -> None:
        """Tell both."""
        for each in self.both:
            each.note(text)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Tell both."""
        for each in self.both:
            each.begin_round(round_, cohort)

    def client_begins(self, client: str) -> None:
        """Tell both."""
        for each in self.both:
            each.client_begins(client)

    def client_done(self, update: Update) -> None:
        """Tell both."""
        for each in self.both:
            each.client_done(update)

    def client_failed(self, failure: Failure) -> None:
        """Tell both."""
        for each in self.both:
            each.client_failed(failure)

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """Tell both."""
        for each in self.both:
            each.end_round(round_, rows)

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Tell both."""
        for each in self.both:
            each.begin_scoring(clients)

    def end(self) -> None:
        """Tell both."""
        for each in self.both:
            each.end()


class PlainProgress(Progress):
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._clock = _Clock()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def begin(self, rounds: int, first: int) -> None:
        """Start the clock."""
        self._clock.begin(rounds, first)

    def note(self, text: str) -> None:
        """Print it."""
        self._say(text)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Print who takes part."""
        self._clock.round = round_
        self._say(f"round {round_}/{self._clock.rounds}: {', '.join(cohort)}")

    def client_done(self, update: Update) -> None:
        """Print what the client reports."""
        self._say(f"  {update.client}: {_facts(update)}")

    def client_failed(self, failure: Failure) -> None:
        """Print which client and why."""
        self._say(f"  {failure.client}: {failure.code}: {failure.place}")

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """Print the round's summary."""
        self._say(self._clock.end_round(round_, rows))

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Say so."""
        self._say(f"scoring the last adapter at {len(clients)} clients")


class LiveProgress(PlainProgress):
    """A table of the running round, redrawn in place; finished rounds stay as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or Console(stderr=True, highlight=False))
        self._clients: dict[str, str] = {}
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)

    def begin(self, rounds: int, first: int) -> None:
        """Start drawing."""
        super().begin(rounds, first)
        self._live.start()

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Draw the round's clients, all waiting."""
        self._clock.round = round_
        self._clients = dict.fromkeys(cohort, "waiting")
        self._draw()

    def client_begins(self, client: str) -> None:
        """Mark the client."""
        self._clients[client] = "training"
        self._draw()

    def client_done(self, update: Update) -> None:
        """Show what the client reports."""
        self._clients[update.client] = _facts(update)
        self._draw()

    def client_failed(self, failure: Failure) -> None:
        """Show which client and why, and keep it on the screen."""
        self._clients[failure.client] = failure.code
        super().client_failed(failure)
        self._draw()

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Say so in the table's place."""
        self._clients = {f"scoring the last adapter at {len(clients)} clients": ""}
        self._draw()

    def end(self) -> None:
        """Stop drawing."""
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, state in self._clients.items():
            table.add_row(name, state)
        return Group(Text(self._clock.headline(), style="bold"), table)


def _facts(update: Update) -> str:
    m = update.metrics
    # a real client under [privacy] keeps its loss
    told = (
        f"loss {m['train_loss']:.3f}, {int(m['num_tokens'])} tokens " if "train_loss" in m else ""
    )
    return f"{told}in {human_seconds(m['seconds'])}, {human_bytes(update.bytes_up)} up"


class _Clock:
    """Which round it is and how long the rest will take, from the rounds of this process."""

    def __init__(self) -> None:
        self.rounds = self.first = self.round = 0
        self.started = time.perf_counter()
        self.bytes = 0

    def begin(self, rounds: int, first: int) -> None:
        self.rounds, self.first, self.started = rounds, first, time.perf_counter()
        self.bytes = 0

    def headline(self) -> str:
        done = self.round - self.first
        text = f"round {self.round}/{self.rounds}, {human_bytes(self.bytes)} sent"
        return text + (f", about {human_seconds(self._left(done))} left" if done > 0 else "")

    def _left(self, done: int) -> float:
        each = (time.perf_counter() - self.started) / max(1, done)
        return each * (self.rounds - self.first + 1 - done)

    def end_round(self, round_: int, rows: Sequence[Row]) -> str:
        self.bytes += sum(
            int(row.get("bytes_up", 0)) + int(row.get("bytes_down", 0)) for row in rows
        )
        loss = f": train loss {train_loss(rows):.3f}" if trained(rows) else ""
        parts: list[Any] = [f"round {round_}/{self.rounds} done{loss}"]
        labels = overall_scores(rows)
        for behind, held_out in held_out_losses(rows).items():
            right = f", accuracy {labels[behind]['accuracy']:.3f}" if behind in labels else ""
            parts.append(f"held-out loss after round {behind}: {held_out:.3f}{right}")
        parts.append(f"{human_bytes(self.bytes)} sent so far")
        left = self._left(round_ - self.first + 1)
        if round_ < self.rounds:
            parts.append(f"about {human_seconds(left)} left")
        stuck = [row["client"] for row in rows if row.get("status") == "did not move"]
        if stuck:
            parts.append(f"did not move: {', '.join(stuck)}")
        return ", ".join(parts)


def pick_progress() -> Progress:
    """A live table when stderr is a terminal, plain lines otherwise."""
    return LiveProgress() if Console(stderr=True).is_terminal else PlainProgress()
