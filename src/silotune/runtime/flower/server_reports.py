"""Progress and outcome of a server app, written for the process that started the engine.

They are lines of JSON in the engine's private folder: these cost nothing, outlive both processes,
and need no port. A bug's traceback goes to the engine's log, not here.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core import errors
from silotune.core.atomic_files import write_json
from silotune.core.errors import EngineError, SilotuneError
from silotune.core.reading_back import parse_object, read_object
from silotune.core.types import Failure, Update
from silotune.federation.progress import Progress

if TYPE_CHECKING:
    from silotune.federation.metrics import Row

PROGRESS, OUTCOME = "progress.jsonl", "outcome.json"
CLOCK_S = 60.0
"""How far the reported start time of one process may move when the system's clock is set."""


class FileProgress(Progress):
    """Writes every event to a file."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / PROGRESS).open("a", encoding="utf-8", buffering=1)
        self._file.write("\n")  # a process that was killed may have left half a line
        self._say("started", pid=os.getpid(), born=born(os.getpid()))

    def _say(self, event: str, **facts: Any) -> None:
        self._file.write(json.dumps({"event": event, **facts}) + "\n")

    def begin(self, rounds: int, first: int) -> None:
        """Pass it on."""
        self._say("begin", rounds=rounds, first=first)

    def has_clients(self, number: int) -> None:
        """Pass it on."""
        self._say("has_clients", number=number)

    def waits_for_consent(self, clients: Sequence[str]) -> None:
        """Pass it on."""
        self._say("waits_for_consent", clients=list(clients))

    def note(self, text: str) -> None:
        """Pass it on."""
        self._say("note", text=text)

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Pass it on."""
        self._say("doing", what=what, done=done, total=total)

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:
        """Pass it on."""
        self._say("begin_round", round_=round_, cohort=list(cohort))

    def client_begins(self, client: str) -> None:
        """Pass it on."""
        self._say("client_begins", client=client)

    def client_scores(self, client: str, done: int, total: int) -> None:
        """Pass it on."""
        self._say("client_scores", client=client, done=done, total=total)

    def client_steps(self, client: str, done: int, total: int, tokens: int) -> None:
        """Pass it on."""
        self._say("client_steps", client=client, done=done, total=total, tokens=tokens)

    def client_done(self, update: Update) -> None:
        """Pass on what is shown of an update, without its tensors."""
        facts = {k: v for k, v in vars(update).items() if k not in ("delta", "extra", "score")}
        self._say("client_done", **facts)

    def client_failed(self, failure: Failure) -> None:
        """Pass it on."""
        self._say("client_failed", **vars(failure))

    def end_round(self, round_: int, rows: "Sequence[Row]") -> None:
        """Pass it on."""
        self._say("end_round", round_=round_, rows=list(rows))

    def begin_scoring(self, clients: Sequence[str]) -> None:
        """Pass it on."""
        self._say("begin_scoring", clients=list(clients))

    def client_scored(self, client: str) -> None:
        """Pass it on."""
        self._say("client_scored", client=client)

    def end(self) -> None:
        """Close the file."""
        self._file.close()


class Follower:
    """Reads what a `FileProgress` writes and passes it on to another progress."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._path = folder / PROGRESS
        self._progress = progress
        self._at = 0
        self.process: tuple[int, float | None] | None = None
        """The server app's process, once it has started: its number, and when it started."""

    def has_ended(self) -> bool:
        """Whether the server app has started and is no longer running."""
        if self.process is None:
            return False
        pid, then = self.process
        now = born(pid)
        return now is None or (then is not None and abs(now - then) > CLOCK_S)

    def follow(self) -> None:
        """Pass on what is new."""
        for event in self._new():
            kind = event.pop("event")
            match kind:
                case "started":
                    self.process = event["pid"], event["born"]
                case "client_done":
                    self._progress.client_done(Update(delta={}, **event))
                case "client_failed":
                    self._progress.client_failed(Failure(**event))
                case _:
                    getattr(self._progress, kind)(**event)

    def _new(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                self._at += len(line)
                with contextlib.suppress(ValueError):  # half a line of a process that was killed
                    yield parse_object(line.decode())


def born(pid: int) -> float | None:
    """When a process started; None if there is no process with this number, or it has ended.

    The system reuses numbers: after a while, and right away after the machine is restarted.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def write_outcome(folder: Path, facts: Mapping[str, Any], error: BaseException | None) -> None:
    """Record how the server app ended. Texts of our own errors hold no rows."""
    ours = isinstance(error, SilotuneError)
    problem = {"kind": type(error).__name__, "text": str(error) if ours else ""} if error else None
    write_json(folder / OUTCOME, {"error": problem, **facts})


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """How the server app ended, or None while it runs.

    Raises:
        SilotuneError: The error that ended it, as an instance of its class.
        EngineError: A bug ended it.
    """
    path = folder / OUTCOME
    if not path.exists():
        return None
    outcome = read_object(path, fix=f"Remove {folder} and resume the run.")
    if problem := outcome["error"]:
        cls = getattr(errors, problem["kind"], None)
        if isinstance(cls, type) and issubclass(cls, SilotuneError):
            raise cls(problem["text"])
        raise EngineError(f"the server app ended with {problem['kind']}.")
    return outcome
