"""live.json: what a run or a client is doing now, for a page or a command of another process.

The file is not part of the result: a run that is done has none, and nothing depends on it. Reading
it imports no torch.
"""

import os
from pathlib import Path
from typing import Any

from silotune.core.reading_back import parse_object

FILE = "live.json"
RUNNING, STOPPED = "running", "stopped"


def read_live(folder: Path) -> dict[str, Any] | None:
    """What the file says, with `at`: when it was written; None without a readable file.

    A process that was killed leaves a file that says "running": then its state is "stopped".
    """
    path = folder / FILE
    try:
        found = parse_object(path.read_text(encoding="utf-8"))
        found["at"] = path.stat().st_mtime
        if found["state"] == RUNNING and not is_alive(int(found["pid"])):
            found["state"] = STOPPED
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    if os.name != "posix":  # there, signal 0 is not only a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
