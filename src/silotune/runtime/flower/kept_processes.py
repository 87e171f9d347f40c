"""Processes that end when this one ends, however it ends: a keeper process holds them."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import owner_only
from silotune.runtime.flower.process_keeper import end_all

KEEPER = "keeper"


class Kept:
    """A keeper process: takes orders to start programs, and reports which ones have ended."""

    def __init__(
        self,
        private: Path,
        *,
        log: Path,
        environment: Mapping[str, str],
        lock: int | None = None,
        umask: int = -1,
    ) -> None:
        """Start the keeper.

        Args:
            private: A folder that the keeper removes at the end.
            log: Where the keeper writes its own errors.
            environment: For the keeper and everything it starts.
            lock: A locked file; it stays locked until the last of the processes is gone.
            umask: For the keeper and everything it starts; -1: this process's.
        """
        self.mark = secrets.token_hex(16)
        with open(log, "ab", opener=owner_only) as file:
            self._keeper = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "silotune.runtime.flower.process_keeper",
                    self.mark,
                    str(private),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches only this process
                pass_fds=() if lock is None else (lock,),
                umask=umask,
            )
        assert self._keeper.stdout is not None
        os.set_blocking(self._keeper.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        """The keeper's process number."""
        return self._keeper.pid

    def start(self, name: str, argv: Sequence[str], *, log: Path) -> None:
        """Start a program; `ended` will report it as `name`."""
        self._order({"name": name, "argv": [program(argv[0]), *argv[1:]], "log": str(log)})

    def tell(self, name: str, signum: int) -> None:
        """Send a signal to the program that was started as `name`, if it is still running."""
        self._order({"name": name, "signal": signum})

    def _order(self, order: Mapping[str, Any]) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(json.dumps(order).encode() + b"\n")
        self._keeper.stdin.flush()

    def ended(self) -> Iterator[tuple[str, int]]:
        """Name and exit status of programs that have ended since the last call.

        KEEPER is reported if the keeper itself has ended, and all programs with it.
        """
        assert self._keeper.stdout is not None
        if self._keeper.poll() is not None:
            yield KEEPER, self._keeper.returncode
            return
        while line := self._keeper.stdout.readline():
            report = json.loads(line)
            yield report["ended"], report["code"]

    def close(self) -> None:
        """End everything that was started, and wait for it."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(timeout=60)
        if self._keeper.returncode != 0:
            self._keeper.kill()
            self._keeper.wait()
            end_all(self.mark, adopted=False)  # this process may have other children
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()


def program(name: str) -> str:
    """Path of a console script in this Python's environment; else its name, to be found on PATH."""
    installed = Path(sysconfig.get_path("scripts")) / name
    return str(installed) if installed.exists() else name
