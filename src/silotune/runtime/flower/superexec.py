"""Flower's executor at a client, which forks a client app instead of starting its program.

Flower starts `flwr-clientapp` for every message. Its imports take seconds of a processor, more than
most messages need. Python's fork server does them once; then every message still has a process of
its own, which knows nothing of the messages before it. Start it as
`python -m silotune.runtime.flower.superexec`, with the arguments of `flower-superexec`.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, get_context
from types import ModuleType, SimpleNamespace
from typing import Any

from flwr.supercore.superexec.executor import subprocess_executor

CLIENT_APP = "flwr-clientapp"
READY = ("flwr.supernode.cli", "silotune.runtime.flower.client", __spec__.name)
"""What the fork server imports. No torch: `client.py` passes messages on to the resident worker."""


def fork_client_apps(module: ModuleType = subprocess_executor) -> None:
    """Make this process's executor fork its client apps.

    Args:
        module: Flower's executor of local processes.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(READY))
    forkserver.ensure_running()  # its imports are done before the first message arrives

    def start(argv: Sequence[str], **streams: Any) -> None:
        if argv[0] != CLIENT_APP:
            subprocess.Popen(argv, **streams)
            return
        quiet = streams.get("stdout") == subprocess.DEVNULL
        # a daemon: the executor does not wait for it when it ends, as with a program
        context.Process(target=client_app, args=(list(argv), quiet), daemon=True).start()

    module.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)  # pyright: ignore[reportAttributeAccessIssue]


def client_app(argv: list[str], quiet: bool) -> None:
    """What the program does.

    Args:
        argv: Its name and arguments.
        quiet: Whether what it prints is dropped.
    """
    from flwr.supernode.cli import flwr_clientapp

    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
    sys.argv = argv
    flwr_clientapp()


if __name__ == "__main__":
    from flwr.supercore.cli import flower_superexec

    if sys.platform == "linux":  # elsewhere, libraries of the system do not all survive a fork
        fork_client_apps()
    flower_superexec()
