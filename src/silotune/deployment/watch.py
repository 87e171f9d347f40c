"""`silotune watch`: a live page of a run, a consortium or a client, on loopback."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError
from silotune.deployment.client_status import OWN
from silotune.deployment.live_client import WatchedClient
from silotune.federation.roster import is_consortium
from silotune.results.live_page import Look, build_app
from silotune.results.loopback import address_of, new_token, server_of, take_port

PORT = 7861
STOP_S = 5.0
RECIPE = "recipe.toml"
"""The file of a run folder."""
WHY = "the page shows what a run knows about its clients, and has no encryption"


def look_of(folder: Path) -> Look:
    """What looks at a folder.

    Raises:
        ConfigError: It is neither a run's, a consortium's nor a client's.
    """
    if (folder / RECIPE).is_file():
        from silotune.results.live_run import (
            WatchedRun,  # brings torch, which a client's page lacks
        )

        run = WatchedRun(folder)
        return lambda: run.look(time.time())
    if is_consortium(folder):
        from silotune.deployment.live_consortium import WatchedConsortium

        return WatchedConsortium(folder).look
    if (folder / OWN).is_file():
        return WatchedClient(folder).look
    raise ConfigError(
        f"{folder} is the folder of no run, consortium or client.\n"
        "  Give a folder that a run printed, or that `server init` or `client init` created."
    )


@dataclass(frozen=True)
class Page:
    """A page that is ready to be served."""

    address: str
    server: Any
    port: socket.socket

    def run(self) -> None:
        """Serve it until a signal, or until `stop`."""
        self.server.run(sockets=[self.port])

    def stop(self) -> None:
        """End it, from another thread."""
        self.server.should_exit = True


@contextlib.contextmanager
def page_in_background(folder: Path, port: int, note: Callable[[str], None]) -> Iterator[None]:
    """Serve the page of a folder in a thread, while the block runs.

    Raises:
        ConfigError: See `served_page`.
    """
    with served_page(folder, port) as page:
        thread = threading.Thread(target=page.run, name="page", daemon=True)
        thread.start()
        note(f"live page: {page.address}")
        try:
            yield
        finally:
            page.stop()
            thread.join(STOP_S)


@contextlib.contextmanager
def served_page(folder: Path, port: int = PORT) -> Iterator[Page]:
    """The page of a folder, with its port open inside the block.

    Raises:
        ConfigError: See `look_of` and `take_port`.
    """
    look, token = look_of(folder), new_token()
    with take_port("127.0.0.1", port, why=WHY, what="the live page") as taken:
        yield Page(address_of(taken, token), server_of(build_app(look, token)), taken)
