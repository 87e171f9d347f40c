"""Flower's own commands, and the environment in which Flower's processes run.

Loads neither torch nor flwr: whoever only asks the engine something starts at once.
"""

import json
import os
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import owner_only
from silotune.runtime.flower.kept_processes import program
from silotune.runtime.parts import MOST_BYTES

RUNS = "SILOTUNE_RUNS"
"""Environment variable of the server app: the folder with one folder per run, named by its id."""
CONNECTION = "engine"
"""The SuperLink's name in Flower's own configuration."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def engine_environment(home: Path, *, private: Path, runs: Path, threads: int) -> dict[str, str]:
    """The caller's environment, set so that Flower sends nothing home and installs nothing.

    Args:
        home: Flower's own folder.
        private: Folder for sockets and other short-lived files.
        runs: See `RUNS`.
        threads: CPU threads of each process.
    """
    asked = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK]
    no_proxy = ",".join(filter(None, asked))
    own = {
        # otherwise a proxy for outgoing traffic would be asked for this machine's own ports too
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        # Flower starts its own programs by name
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # one at a time: over a slow link, two at once would each take twice as long
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(MOST_BYTES),
        "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",
        "TMPDIR": str(private),
        "OMP_NUM_THREADS": str(threads),
        RUNS: str(runs),
    }
    return {**os.environ, **own}


def flwr(words: "tuple[str, ...]", *, environment: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Run one of Flower's commands and read its answer as JSON; empty if it is not JSON."""
    done = subprocess.run(
        [program("flwr"), *words],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    with open(log, "a", encoding="utf-8", opener=owner_only) as file:
        file.write(done.stderr)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        with open(log, "a", encoding="utf-8", opener=owner_only) as file:
            file.write(done.stdout)
        return {}
    return answer if isinstance(answer, dict) else {}
