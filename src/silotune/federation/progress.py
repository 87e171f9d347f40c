"""The events of a run, and how they are shown on stderr: live in a terminal, as lines otherwise.

A `Progress` is told what happens and decides nothing. The base class shows nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from silotune.core.types import Failure, Update

if TYPE_CHECKING:
    from silotune.federation.metrics import Row
    from silotune.federation.progress_lines import PlainProgress


class Progress:
    """Is told what a run does, and prints nothing; subclasses do."""

    def begin(self, rounds: int, first: int) -> None:
        """A run starts or resumes at round `first` of `rounds`."""

    def has_clients(self, number: int) -> None:
        """The run has so many clients; a round may ask only some of them."""

    def waits_for_consent(self, clients: Sequence[str]) -> None:
        """These clients, and no others, wait until their people agree to the run."""

    def note(self, text: str) -> None:
        """Something to know, for example a warning."""

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """A step outside the rounds begins or goes on, for example loading the base model."""

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """A round begins."""

    def client_begins(self, client: str) -> None:
        """A client starts its part of a round. Only some runtimes can see this and report it."""

    def client_scores(self, client: str, done: int, total: int) -> None:
        """A client has scored `done` of `total` batches of held-out rows; begins with 0."""

    def client_steps(self, client: str, done: int, total: int, tokens: int) -> None:
        """A client has taken `done` of `total` steps, over so many tokens; begins with 0.

        On a GPU, these are the steps that it was given; the last few may still be running.
        """

    def client_done(self, update: Update) -> None:
        """A client's update was accepted."""

    def client_failed(self, failure: Failure) -> None:
        """A client did not deliver a usable update."""

    def end_round(self, round_: int, rows: "Sequence[Row]") -> None:
        """A round was recorded."""

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """All clients score the final adapter."""

    def client_scored(self, client: str) -> None:
        """A client has scored the final adapter, or has failed to."""

    def end(self) -> None:
        """The rounds are over. Also called after an error."""


class Both(Progress):
    """Passes each event on to two `Progress` objects."""

    def __init__(self, one: Progress, other: Progress) -> None:
        self.both = (one, other)

    def begin(self, rounds: int, first: int) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.begin(rounds, first)

    def has_clients(self, number: int) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.has_clients(number)

    def waits_for_consent(self, clients: Sequence[str]) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.waits_for_consent(clients)

    def note(self, text: str) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.note(text)

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.doing(what, done, total)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.begin_round(round_, cohort)

    def client_begins(self, client: str) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_begins(client)

    def client_scores(self, client: str, done: int, total: int) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_scores(client, done, total)

    def client_steps(self, client: str, done: int, total: int, tokens: int) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_steps(client, done, total, tokens)

    def client_done(self, update: Update) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_done(update)

    def client_failed(self, failure: Failure) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_failed(failure)

    def end_round(self, round_: int, rows: "Sequence[Row]") -> None:
        """Pass it on to both."""
        for each in self.both:
            each.end_round(round_, rows)

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.begin_scoring(clients)

    def client_scored(self, client: str) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.client_scored(client)

    def end(self) -> None:
        """Pass it on to both."""
        for each in self.both:
            each.end()


def pick_progress() -> "PlainProgress":
    """Show a live table if stderr is a terminal, plain lines otherwise."""
    from rich.console import Console

    from silotune.federation.progress_lines import LiveProgress, PlainProgress

    return LiveProgress() if Console(stderr=True).is_terminal else PlainProgress()


@contextlib.contextmanager
def shown() -> Iterator[Progress]:
    """As `pick_progress`, and never silent for long inside the block: for commands.

    Results belong on stdout after the block.
    """
    progress = pick_progress()
    with progress.ticking():
        yield progress
