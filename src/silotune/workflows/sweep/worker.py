"""A sweep's worker: trains the run folders that it is given, one after another, on one base.

    python -m silotune.workflows.sweep.worker

A line on standard input names a run folder; a line of JSON on standard output says how it ended.
When its input closes, the worker exits, even during a run: then the sweep's process is gone. The
run continues after its last round when the sweep is resumed.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from silotune.core.atomic_files import owner_only
from silotune.federation.progress_lines import PlainProgress
from silotune.federation.run_folder import RunFolder
from silotune.workflows.shared_base import Bench, attempt


class WorkerProcess:
    """The sweep's side: starts a worker when there is something to do, and again if it was killed.

    Args:
        log: The file for the worker's messages.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def train(self, place: Path) -> str | None:
        """Let the worker finish a run. Returns why it failed, or None."""
        process = self._started()
        line = ""
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).write(f"{place}\n")
            _pipe(process.stdin).flush()
            line = _pipe(process.stdout).readline()
        if line:
            return json.loads(line)["failed"]
        self._process = None
        return f"its process exited with code {_code_of(process)}; see {self.log}"

    def stop(self) -> None:
        """End the worker now."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()
            _code_of(self._process)

    def _started(self) -> subprocess.Popen[str]:
        assert not self._stopped
        if self._process is None:
            with open(self.log, "a", encoding="utf-8", opener=owner_only) as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "silotune.workflows.sweep.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the parent process
                )
        return self._process


def _code_of(process: subprocess.Popen[str]) -> int:
    """Wait for a process to exit, close its pipes, and return its exit code."""
    with contextlib.suppress(BrokenPipeError):
        _pipe(process.stdin).close()
    code = process.wait()
    _pipe(process.stdout).close()
    return code


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


# --- in the worker process ------------------------------------------------------------------------


def main() -> None:
    """Train the run folders that standard input names."""
    replies, asked = sys.stdout, queue.SimpleQueue[str]()
    threading.Thread(target=_listen, args=[asked], daemon=True).start()
    bench = Bench(PlainProgress())
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        while True:
            failed = attempt(bench, RunFolder.open(Path(asked.get())))
            replies.write(json.dumps({"failed": failed}) + "\n")
            replies.flush()


def _listen(asked: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        asked.put(line.rstrip("\n"))
    os._exit(1)


if __name__ == "__main__":
    main()
