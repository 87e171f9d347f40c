"""Writes live.json (see live_file.py): what a run or a client is doing now.

The process that works only changes values in memory; a thread writes them, at most once a second.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import owner_only
from silotune.core.errors import SilotuneError
from silotune.core.safe_text import one_line
from silotune.federation.live_file import FILE, RUNNING, STOPPED
from silotune.federation.progress_lines import Lines, every

MOST_LINES = 200
"""Lines of the log that are kept."""
WRITE_S = 1.0


class LiveFile(Lines):
    """Follows a run, and writes what it is doing."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet; see `writing`."""
        super().__init__()
        self._path = folder / FILE
        self._log: deque[tuple[float, str]] = deque(maxlen=MOST_LINES)
        self._began = time.time()
        self._written = ""
        self.more: dict[str, Any] = {}
        """Other facts to write."""

    def say(self, text: str) -> None:
        """Keep it for the log."""
        with self.lock:
            self._log.append((time.time(), one_line(text)))

    def wait(self, what: str) -> None:
        """Nothing is trained or scored; say what is done instead."""
        with self.lock:
            self.end()
            self.doing(what)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, the file says what is going on. Afterwards it is gone, or says why it stopped."""
        self._write(RUNNING)
        try:
            with every(WRITE_S, lambda: self._write(RUNNING)):
                yield
        except BaseException as error:
            why = str(error) if isinstance(error, SilotuneError) else type(error).__name__
            self.say(why)
            self._write(STOPPED)
            raise
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _write(self, state: str) -> None:
        with self.lock:
            facts = {
                "pid": os.getpid(),
                "began": self._began,
                "state": state,
                **self.more,
                "stage": self.stage,
                "headline": self.headline(),
                "round": self.round,
                "rounds": self.rounds,
                "bytes": self.size_bytes,
                "seconds_left": self.seconds_left(),
                "clients": {
                    name: {"state": own.state, "words": own.words()}
                    for name, own in self.clients.items()
                },
                "log": list(self._log),
            }
        text = json.dumps(facts, ensure_ascii=False)
        if text == self._written:
            return
        part = self._path.with_name(f".{FILE}.part")
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            # not `write_atomically`: that waits for the disk, every second
            with open(part, "w", encoding="utf-8", opener=owner_only) as file:
                file.write(text)
            part.replace(self._path)
            self._written = text
