"""A client's resident worker: keeps model and tokens between the messages of a deployment.

Flower has a new process for every message; loading a model in each would cost more than most
rounds. So that process asks this one, over a socket in a folder that only its own user can enter.
Plain bytes travel, and nothing is pickled. The worker ends after it has been idle for a while. Its
error texts go to the log in the client's state folder.

    python -m silotune.runtime.flower.resident_worker CLIENT_TOML
"""

import contextlib
import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from silotune.core.errors import EngineError, UpdateError
from silotune.runtime.payload import Parcel, pack, unpack

START_S = 120
"""Seconds a new worker has to open its socket."""
MAX_PATH = 103
"""Most bytes in the address of a socket; Linux allows four more."""


# --- the asking side: no torch -------------------------------------------------------------------


def ask(config: Path, parcel: Parcel, *, round_: int) -> Parcel:
    """Let the client's worker answer; start one if none is running.

    Args:
        config: The client's own configuration.
        parcel: kind, recipe, run and the server's parcel.
        round_: For the failure, if the worker ends before it has answered.
    """
    for _ in range(2):  # a worker may go idle between the connection and the question
        try:
            with _connect(config) as line:
                line.send_bytes(pack(parcel))
                return unpack(line.recv_bytes())
        except (BrokenPipeError, ConnectionResetError):
            continue
        except (EOFError, OSError, UpdateError):  # OSError: it ended in the middle of its answer
            break
        except EngineError as error:  # Flower would pass its text on to the server
            sys.stderr.write(f"{error}\n")
            return _failure("worker not started", round_)
    return _failure("worker ended", round_)


def _failure(code: str, round_: int) -> Parcel:
    facts = {"round": round_, "code": code, "place": "resident worker"}
    return Parcel({"failure": {**facts, "fix": "the reason is in this client's log"}})


def _connect(config: Path) -> Connection:
    address = _socket(config)
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        return _line_to(address)
    worker = _start(config)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return _line_to(address)
        if worker.poll() == 0:  # another was first: it is still loading, or is just ending
            worker = _start(config)
        if worker.poll() is not None:
            break
        time.sleep(0.05)
    raise EngineError(
        f"the resident worker of {config} did not start within {START_S} s.\n"
        "  See worker.log in the client's state folder."
    )


def _start(config: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "silotune.runtime.flower.resident_worker", str(config)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _line_to(address: Path) -> Connection:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(address))
        return Connection(line.detach())


def _socket(config: Path) -> Path:
    """A short path in a folder that only this user can enter."""
    folder = Path(tempfile.gettempdir()) / f"silotune-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or found.st_mode & 0o077:
        raise EngineError(
            f"{folder} is open to other users of this machine.\n  Remove it, or set TMPDIR."
        )
    address = folder / f"{hashlib.sha256(str(config.absolute()).encode()).hexdigest()[:16]}.sock"
    if len(os.fsencode(address)) > MAX_PATH:
        raise EngineError(f"{address} is too long for a socket.\n  Set TMPDIR to a shorter path.")
    return address


# --- the answering side --------------------------------------------------------------------------


def main(config: Path) -> None:
    """Serve until nobody has asked for a while."""
    from silotune.core.atomic_files import make_folder, owner_only
    from silotune.federation.client_config import load_client_config

    own = load_client_config(config)
    state = Path(own.state)
    make_folder(state)
    path = state / "worker.log"
    with open(path, "a", 1, encoding="utf-8", opener=owner_only) as log, _alone(config):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        address = _socket(config)
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            listener.settimeout(own.runtime.idle_s)
            try:
                _serve(listener, config)
            finally:
                address.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(config: Path) -> Iterator[None]:
    """One worker per client: a second one ends at once, and the asking side finds the first."""
    import fcntl

    with _socket(config).with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(0)
        yield


def _serve(listener: socket.socket, config: Path) -> None:
    from silotune.runtime.real_client import Deployed

    client = Deployed(config)
    with client.live.writing():
        while True:
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                return
            # the asking process may end in the middle of its question or of the answer
            with Connection(accepted.detach()) as line, contextlib.suppress(EOFError, OSError):
                line.send_bytes(pack(client.answer(unpack(line.recv_bytes()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
