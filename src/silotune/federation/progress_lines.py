"""The two ways to show a run on stderr: a table that is redrawn in place, or lines for a log."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from silotune.core.safe_text import one_line
from silotune.core.types import Failure, Update
from silotune.core.wording import counted
from silotune.federation.metrics import Row
from silotune.federation.run_view import (
    DONE,
    FAILED,
    SCORING,
    STARTING,
    TRAINING,
    WAITING,
    ClientView,
    RunView,
    facts,
)

MOST = 10_000
"""Most characters of a line: a round's line names its cohort."""
SILENT_S = (5.0, 60.0)
"""A log gets a line after so many seconds of silence: 5 in the first five minutes, then a sixtieth
of the time so far, at most a minute."""
NAME_COLUMNS = 24
ORDER = {TRAINING: 0, SCORING: 0, FAILED: 1, WAITING: 2, DONE: 3}
"""Which clients are shown if a terminal has not room for all."""


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Inside, something is done every so many seconds, in a thread of its own."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            act()

    thread = threading.Thread(target=work, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Stderr(Console):
    """stderr, whose reader may end before the run does, as in `silotune run ... 2>&1 | head`."""

    def on_broken_pipe(self) -> None:
        """Let the run go on: by default, rich ends the program."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


class Lines(RunView):
    """One line per event. Subclasses say where it goes."""

    def say(self, text: str) -> None:
        """Take a line; it holds foreign text."""
        raise NotImplementedError

    def beat(self) -> None:
        """Called at every step; says what is going on from time to time, or nothing."""

    def note(self, text: str) -> None:
        """Print it."""
        super().note(text)
        self.say(text)

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Print what begins; how far it is follows if it takes long."""
        begins = self.stage != what
        super().doing(what, done, total)
        if begins:
            self.say(what)
        self.beat()

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Print which clients take part."""
        super().begin_round(round_, cohort)
        self.say(f"round {round_}/{self.rounds}: {', '.join(cohort)}")

    def client_scores(self, client: str, done: int, total: int) -> None:
        """Print it from time to time."""
        super().client_scores(client, done, total)
        self.beat()

    def client_steps(self, client: str, done: int, total: int, tokens: int) -> None:
        """Print it from time to time."""
        super().client_steps(client, done, total, tokens)
        self.beat()

    def client_done(self, update: Update) -> None:
        """Print what the client reports."""
        super().client_done(update)
        self.say(f"  {update.client}: {facts(update)}")

    def client_failed(self, failure: Failure) -> None:
        """Print which client failed and why."""
        super().client_failed(failure)
        self.say(f"  {failure.client}: {failure.code}: {failure.place}")

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """Print the round's summary."""
        super().end_round(round_, rows)
        self.say(self.round_line(round_, rows))

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Print how many clients score."""
        super().begin_scoring(clients)
        self.say(f"scoring the final adapter at {counted(len(clients), 'client')}")


class PlainProgress(Lines):
    """Lines for logs and pipes: one per event, and one when nothing has been said for a while."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or _Stderr(stderr=True, soft_wrap=True, highlight=False)
        self._began = self._last = self.clock()

    def say(self, text: str) -> None:
        """Print it."""
        with contextlib.suppress(OSError):  # a terminal that is gone is no reason to stop
            # one event is one line, whatever a client calls itself or its failure
            self.console.print(one_line(text, longest=MOST), markup=False)
        self._last = self.clock()

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Inside, a line says what is going on whenever no event has for a while."""
        self.stage = STARTING
        with every(0.5, self.beat):
            yield

    def beat(self) -> None:
        """Say what is going on, unless something was said a short while ago."""
        with self.lock:
            now = self.clock()
            shortest, longest = SILENT_S
            if now - self._last >= min(longest, max(shortest, (now - self._began) / 60)):
                self.say(f"  {self.now() or 'still working'}")


class LiveProgress(PlainProgress):
    """A table of the current round, redrawn in place. Finished rounds stay as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or _Stderr(stderr=True, highlight=False))
        self._held = False
        self._live = Live(
            console=self.console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,  # results go there, and are not progress
            get_renderable=self._picture,
        )

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Draw from the beginning to the end of the block."""
        self.stage, self._held = STARTING, True
        with self._live:
            yield

    def beat(self) -> None:
        """Nothing to say: the picture moves."""

    def begin(self, rounds: int, first: int) -> None:
        """Start drawing."""
        super().begin(rounds, first)
        self._live.start()

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Draw it; without a picture, print it."""
        if self._live.is_started:
            RunView.doing(self, what, done, total)
        else:
            super().doing(what, done, total)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Draw the round's clients, all waiting."""
        RunView.begin_round(self, round_, cohort)

    def client_done(self, update: Update) -> None:
        """Draw what the client reports."""
        RunView.client_done(self, update)

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Draw the clients that score."""
        RunView.begin_scoring(self, clients)

    def end(self) -> None:
        """Stop drawing."""
        super().end()
        if not self._held:
            self._live.stop()

    def _picture(self) -> RenderableType:
        with self.lock:
            rows = _fitting(self.clients, most=max(3, self.console.height - 4))
            left_out = len(self.clients) - len(rows)
            names = {name: Text(one_line(name)) for name in rows}
            width = min(NAME_COLUMNS, max((text.cell_len for text in names.values()), default=0))
            parts: list[RenderableType] = []
            for name, text in names.items():
                text.truncate(width, overflow="ellipsis", pad=True)
                parts.append(_line(text.append(f"  {one_line(rows[name].words())}")))
            if text := self.headline() or ("" if self.clients else "working"):
                parts.insert(0, _line(Text(one_line(text), style="bold")))
            if left_out:
                parts.append(Text(f"and {counted(left_out, 'client')} more"))
            return Group(*parts)


def _line(text: Text) -> Text:
    """Text that ends where the terminal does."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _fitting(clients: Mapping[str, ClientView], most: int) -> dict[str, ClientView]:
    """All clients, or in their order those that are busiest."""
    kept = set(sorted(clients, key=lambda name: ORDER[clients[name].state])[:most])
    return {name: own for name, own in clients.items() if name in kept}
