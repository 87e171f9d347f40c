"""What a person sees during a run, on stderr: a live table in a terminal, plain lines otherwise.

A `Progress` is told what happens and decides nothing. The base class prints nothing.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from silotune.core.safe_text import one_line
from silotune.core.types import Failure, Update
from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.federation.metrics import (
    Row,
    held_out_losses,
    overall_scores,
    part_of,
    server_losses,
    server_set,
    train_loss,
    trained,
)

MOST = 10_000
"""Most characters of a line: a round's line names its cohort."""


class Progress:
    """Prints nothing; subclasses do."""

    def begin(self, rounds: int, first: int) -> None:
        """A run starts or resumes at round `first` of `rounds`."""

    def note(self, text: str) -> None:
        """A step outside the rounds, for example loading the base model."""

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """A round begins."""

    def client_begins(self, client: str) -> None:
        """A client starts training. Only some runtimes can see this and report it."""

    def client_done(self, update: Update) -> None:
        """A client's update was accepted."""

    def client_failed(self, failure: Failure) -> None:
        """A client did not deliver a usable update."""

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """A round was recorded."""

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """All clients score the final adapter."""

    def end(self) -> None:
        """No more events follow. Also called after an error."""


class Both(Progress):
    """Passes each event on to two `Progress` objects."""

    def __init__(self, one: Progress, other: Progress) -> None:
        self.both = (one, other)

    def begin(self, rounds: int, first: int) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.begin(rounds, first)

    def note(self, text: str) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.note(text)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.begin_round(round_, cohort)

    def client_begins(self, client: str) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_begins(client)

    def client_done(self, update: Update) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_done(update)

    def client_failed(self, failure: Failure) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_failed(failure)

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.end_round(round_, rows)

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.begin_scoring(clients)

    def end(self) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.end()


class _Stderr(Console):
    """stderr, whose reader may end before the run does, as in `silotune run ... 2>&1 | head`."""

    def on_broken_pipe(self) -> None:
        """Let the run go on: by default, rich ends the program."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


class PlainProgress(Progress):
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Stderr(stderr=True, soft_wrap=True, highlight=False)
        self._clock = _Clock()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone is no reason to stop
            # one event is one line, whatever a client calls itself or its failure
            self.console.print(one_line(text, longest=MOST), markup=False)

    def begin(self, rounds: int, first: int) -> None:
        """Start the clock."""
        self._clock.begin(rounds, first)

    def note(self, text: str) -> None:
        """Print it."""
        self._say(text)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Print which clients take part."""
        self._clock.round = round_
        self._say(f"round {round_}/{self._clock.rounds}: {', '.join(cohort)}")

    def client_done(self, update: Update) -> None:
        """Print what the client reports."""
        self._say(f"  {update.client}: {_facts(update)}")

    def client_failed(self, failure: Failure) -> None:
        """Print which client failed and why."""
        self._say(f"  {failure.client}: {failure.code}: {failure.place}")

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """Print the round's summary."""
        self._say(self._clock.end_round(round_, rows))

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Print how many clients score."""
        self._say(_scoring(clients))


class LiveProgress(PlainProgress):
    """A table of the current round, redrawn in place. Finished rounds stay as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or _Stderr(stderr=True, highlight=False))
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
        """Show that the client is training."""
        self._clients[client] = "training"
        self._draw()

    def client_done(self, update: Update) -> None:
        """Show what the client reports."""
        self._clients[update.client] = _facts(update)
        self._draw()

    def client_failed(self, failure: Failure) -> None:
        """Show which client failed and why, and keep that line on the screen."""
        self._clients[failure.client] = failure.code
        super().client_failed(failure)
        self._draw()

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Replace the table with how many clients score."""
        self._clients = {_scoring(clients): ""}
        self._draw()

    def end(self) -> None:
        """Stop drawing."""
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, state in self._clients.items():
            table.add_row(Text(one_line(name)), Text(one_line(state)))
        return Group(Text(self._clock.headline(), style="bold"), table)


def _scoring(clients: Sequence[str]) -> str:
    return f"scoring the final adapter at {counted(len(clients), 'client')}"


def _facts(update: Update) -> str:
    m = update.metrics
    sent = f"{human_bytes(update.bytes_up)} uploaded"
    if "train_loss" not in m:  # real clients send neither losses nor times under [privacy]
        return sent
    learned = f"loss {m['train_loss']:.3f}, {counted(int(m['num_tokens']), 'token')}"
    return f"{learned} in {human_seconds(m['seconds'])}, {sent}"


class _Clock:
    """The current round, and the time left as estimated from the rounds of this process."""

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
        for scored, held_out in held_out_losses(rows).items():
            accuracy = f", accuracy {labels[scored]['accuracy']:.3f}" if scored in labels else ""
            name = f"{part_of(rows)} loss"
            parts.append(f"{name} after round {scored}: {held_out:.3f}{accuracy}")
        for scored, loss in server_losses(rows).items():
            parts.append(f"{server_set(rows)} after round {scored}: loss {loss:.3f}")
        parts.append(f"{human_bytes(self.bytes)} sent so far")
        left = self._left(round_ - self.first + 1)
        if round_ < self.rounds:
            parts.append(f"about {human_seconds(left)} left")
        stuck = [row["client"] for row in rows if row.get("status") == "did not move"]
        if stuck:
            parts.append(f"did not move: {', '.join(stuck)}")
        return ", ".join(parts)


def pick_progress() -> Progress:
    """Show a live table if stderr is a terminal, plain lines otherwise."""
    return LiveProgress() if Console(stderr=True).is_terminal else PlainProgress()
