"""One case in a forked process with limits, so that whatever hangs or dies costs only itself."""

import contextlib
import json
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from silotune.core.errors import SilotuneError

ENDS = ("clear", "terse", "accepted", "silent", "traceback", "hang", "died")
"""clear: one of our errors, with a fix. terse: one of our errors in a single line. accepted: used
without a word, and rightly so. silent: used without a word, though it was damaged. traceback: any
other exception. hang: no end within the limit. died: ended by a signal, or out of memory."""
FAULTS = ("silent", "traceback", "hang", "died")


class Silent(Exception):
    """Damaged input was used, and gave something else than whole input."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    end: str
    said: str = ""
    where: str = ""
    seconds: float = 0.0


def run_case(case: Callable[[], object], *, limit_s: float, memory_gb: float) -> Outcome:
    """Fork, call `case`, and say how it ended."""
    forks = multiprocessing.get_context("fork")
    receiver, sender = forks.Pipe(duplex=False)
    process = forks.Process(target=_work, args=(case, sender, int(memory_gb * 2**30)))
    began = time.monotonic()
    process.start()
    sender.close()
    told = None
    if receiver.poll(limit_s):
        with contextlib.suppress(EOFError):
            told = receiver.recv()
        process.join(5)
    is_late = process.is_alive()
    if is_late:
        process.kill()
        process.join()
    seconds = time.monotonic() - began
    if told is not None:
        return Outcome(**json.loads(told), seconds=seconds)
    if is_late:
        return Outcome("hang", f"no end within {limit_s:g} s", seconds=seconds)
    return Outcome("died", f"exit status {process.exitcode}", seconds=seconds)


def _work(case: Callable[[], object], sender: Connection, memory: int) -> None:
    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sender.send(json.dumps(_tried(case)))
    os._exit(0)


def _tried(case: Callable[[], object]) -> dict[str, str]:
    try:
        return {"end": "accepted", "said": str(case())[:200]}
    except SilotuneError as error:
        text = f"{type(error).__name__}: {error}"
        return {"end": "clear" if "\n" in text else "terse", "said": text[:1000]}
    except Silent as error:
        return {"end": "silent", "said": str(error)[:300]}
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "silotune" in f.filename and "/tests/" not in f.filename]
        last = (ours or frames)[-1]
        where = f"{'/'.join(last.filename.rsplit('/', 2)[1:])}:{last.lineno} {last.name}"
        text = f"{type(error).__name__}: {error}"
        return {"end": "traceback", "said": text[:300], "where": where}
