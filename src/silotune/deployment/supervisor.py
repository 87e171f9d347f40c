"""Keeps programs running: a program that ends is restarted, after a pause that grows.

They end with this process, however it ends (`runtime/flower/process_keeper.py`). So whatever keeps
this process running (systemd, a container's restart policy, a person) keeps all of them running.
"""

import contextlib
import fcntl
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.core.atomic_files import owner_only
from silotune.core.errors import ConfigError, EngineError
from silotune.runtime.flower.kept_processes import KEEPER, Kept

MOST_REST_S = 60.0
"""The longest pause before a program is restarted."""
STEADY_S = 120.0
"""A program that ran this long gets the shortest pause again."""
Note = Callable[[str], None]


@dataclass
class _Kept:
    argv: Sequence[str]
    rest_s: float
    began: float = 0.0
    failures: int = 0
    due: float = 0.0
    """When it will be restarted; 0 while it runs."""


class Supervisor:
    """Starts programs, and restarts them."""

    def __init__(
        self, private: Path, *, logs: Path, environment: Mapping[str, str], note: Note
    ) -> None:
        """Nothing runs yet; see `keep`.

        Args:
            private: A folder for short-lived files, removed at the end.
            logs: A folder in which each program has its own log.
            environment: For all programs.
            note: Told what ends and is restarted.
        """
        # its programs write nowhere else than into the folders of a server or a client
        self._kept = Kept(private, log=logs / "keeper.log", environment=environment, umask=0o077)
        self._logs, self._note = logs, note
        self._programs: dict[str, _Kept] = {}
        self._once: set[str] = set()

    def keep(self, name: str, argv: Sequence[str], *, rest_s: float = 1.0) -> None:
        """Start a program and keep it running.

        Args:
            name: Its name in notes, in `tell` and for its log.
            argv: The program and its arguments.
            rest_s: The shortest pause before it is restarted; it doubles each time.
        """
        self._programs[name] = _Kept(argv, rest_s)
        self._start(name)

    def start_once(self, name: str, argv: Sequence[str], *, log: Path) -> None:
        """Start a program that is not restarted; `tend` reports its end."""
        self._once.add(name)
        self._kept.start(name, argv, log=log)

    def tell(self, name: str, signum: int = signal.SIGTERM) -> None:
        """Send a program a signal."""
        self._kept.tell(name, signum)

    def log_of(self, name: str) -> Path:
        """Where a kept program writes."""
        return self._logs / f"{name}.log"

    def tend(self) -> Iterator[tuple[str, int]]:
        """Restart what is due; yield name and exit status of `start_once` programs that ended.

        Raises:
            EngineError: The keeper has ended, and with it all programs.
        """
        now = time.monotonic()
        for name, code in self._kept.ended():
            if name == KEEPER:
                raise EngineError(
                    "the keeper of all programs has ended.\n  Start this command again."
                )
            if name in self._once:
                self._once.discard(name)
                yield name, code
                continue
            own = self._programs[name]
            own.failures = 1 if now - own.began > STEADY_S else own.failures + 1
            rest = min(MOST_REST_S, own.rest_s * 2 ** (own.failures - 1))
            own.due = now + rest
            why = f"{_meaning(code)}; see {self.log_of(name)}"
            self._note(f"{name} ended ({why}) and is restarted in {rest:g} s")
        for name, own in self._programs.items():
            if 0 < own.due <= now:
                self._start(name)

    def _start(self, name: str) -> None:
        own = self._programs[name]
        own.began, own.due = time.monotonic(), 0.0
        self._kept.start(name, own.argv, log=self.log_of(name))

    def close(self) -> None:
        """End all programs, and wait for it."""
        self._kept.close()


def _meaning(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


@contextlib.contextmanager
def only_one(path: Path, *, what: str) -> Iterator[None]:
    """Hold a lock file while something runs that may run only once at a time.

    Raises:
        ConfigError: Another process holds it.
    """
    with open(path, "a", opener=owner_only) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{what}, in another process.\n  Stop that process first.") from None
        yield
