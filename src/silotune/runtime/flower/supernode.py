"""Flower's SuperNode, which accepts our bundle only. What else a server sends never starts.

Flower runs whatever bundle a server sends, and its own `--trusted-entities` knows signatures of its
hub only. Everything that a client app receives comes from the SuperNode's state, and it gets there
at one place: where the SuperNode fetches a run and its bundle. So both are checked at that place,
and the bundle again where the state stores it; this holds for both of Flower's isolation modes. A
refused message is answered with an error, and nothing of its run is kept. Start it as
`python -m silotune.runtime.flower.supernode`, with the arguments of `flower-supernode`.

The functions that this replaces are Flower's own affair and may change. So this file starts only
the versions of Flower that it was read against, and only if these functions are as they were.
"""

import hashlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.version import package_version
from flwr.supernode import start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from silotune.core.errors import EngineError, SilotuneError
from silotune.federation import operator_log
from silotune.runtime.flower.bundle import (
    FAB_ID,
    FAB_VERSION,
    READ,
    TOLD,
    BundleError,
    check_bundle,
    versions_read,
)

PULL, INSERT, STORE = "_pull_and_store_message", "_insert_message", "store_fab"
ARGUMENTS = {
    PULL: (
        *("state", "object_store", "node_config", "receive", "get_run", "get_fab"),
        *("pull_object", "confirm_message_received", "trusted_entities"),
    ),
    INSERT: ("msg", "state", "store"),
    STORE: ("self", "fab"),
}
"""Flower's functions that matter here, and the arguments that they had when they were read."""
LEAST_S = 30.0
"""Flower's own limit of a request, which holds for small ones."""
SLOWEST = 3_500
"""Bytes per second at which a part of 512 KB is still waited for, a little less than 32 kbit/s. It
takes two and a half minutes; after three, Flower's server forgets what it has of a message."""
EXECUTOR = "flower-superexec"
REFUSED = "This client runs only the bundle of its own silotune."
"""All that the server is told."""
Tell = Callable[[Mapping[str, Any], int, str], None]
"""Is given the node's config, Flower's number of the run, and why it is refused."""


def pin(
    tell: Tell,
    *,
    module: ModuleType = start_client_internal,
    state: type = InMemoryNodeState,
    version: str = package_version,
) -> None:
    """Make this process's SuperNode refuse every run whose bundle is not ours.

    Args:
        tell: Told about every refusal.
        module: Flower's main loop of a SuperNode.
        state: Flower's state of a SuperNode.
        version: Flower's version.

    Raises:
        EngineError: This Flower is not one that was read; nothing may be started.
    """
    if not version.startswith(READ):
        raise _changed(f"it is version {version}")
    for place, name in ((module, PULL), (module, INSERT), (state, STORE)):
        found = getattr(place, name, None)
        if not inspect.isfunction(found):
            raise _changed(f"it has no function {name}")
        if tuple(inspect.signature(found).parameters) != ARGUMENTS[name]:
            raise _changed(f"its function {name} takes other arguments")
    pull, insert = getattr(module, PULL), getattr(module, INSERT)
    setattr(module, PULL, _checked_pull(pull, insert, tell))
    setattr(state, STORE, _checked_store(getattr(state, STORE)))


def start_own_executor(module: ModuleType = start_client_internal) -> None:
    """Make this process's SuperNode start our executor (superexec.py) instead of Flower's program.

    Args:
        module: Flower's main loop of a SuperNode.
    """

    def start(argv: Sequence[str]) -> None:
        own = (sys.executable, "-m", "silotune.runtime.flower.superexec")
        subprocess.Popen([*own, *argv[1:]] if argv[0] == EXECUTOR else argv)

    module.subprocess = SimpleNamespace(Popen=start)  # pyright: ignore[reportAttributeAccessIssue]


def be_patient(client: type = FleetHttpClient) -> None:
    """Make this process's SuperNode wait longer for the answer to a larger request.

    Flower gives up on any request after 30 s and sends it again. Over a slow link, a large part of
    a message would never arrive, and it cannot be cut smaller once its message has been named.

    Args:
        client: Flower's connection from a SuperNode to its server.
    """
    send = client._unary_unary

    def patient(self: Any, *, request: Any, timeout: float | None = None, **more: Any) -> Any:
        if timeout is None:
            timeout = max(LEAST_S, request.ByteSize() / SLOWEST)
        return send(self, request=request, timeout=timeout, **more)

    client._unary_unary = patient


def _changed(what: str) -> EngineError:
    return EngineError(
        f"this client cannot check what Flower would run here: {what}.\n"
        f"  Install Flower {versions_read()}: make env EXTRAS=deploy"
    )


def _checked_pull(
    pull: Callable[..., int | None], insert: Callable[..., None], tell: Tell
) -> Callable[..., int | None]:
    def checked(**given: Any) -> int | None:
        received: list[Message] = []

        def receive() -> Any:
            found = given["receive"]()
            if found is not None:
                received.append(found[0])
            return found

        def get_run(run_id: int) -> Run:
            run = given["get_run"](run_id)
            check_run(run)
            return run

        def get_fab(fab_hash: str, run_id: int) -> Fab:
            fab = given["get_fab"](fab_hash, run_id)
            check_fab(fab, fab_hash)
            return fab

        own = {"receive": receive, "get_run": get_run, "get_fab": get_fab}
        try:
            return pull(**{**given, **own})
        except BundleError as error:
            message = received[-1]
            tell(given["node_config"], message.metadata.run_id, str(error))
            reply = Message(Error(ErrorCode.INVALID_FAB, REFUSED), reply_to=message)
            insert(reply, given["state"], given["object_store"])
            return message.metadata.run_id

    return checked


def _checked_store(store: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Any, fab: Fab) -> Any:
        check_bundle(fab.content)
        return store(self, fab)

    return checked


def check_run(run: Run) -> None:
    """Refuse a run that is not of our app: Flower makes a path of its bundle's name and version.

    Raises:
        BundleError: Says in what it differs.
    """
    if (run.fab_id, run.fab_version) != (FAB_ID, FAB_VERSION):
        named = f"{run.fab_id} {run.fab_version}"[:200]
        raise BundleError(f"the run is of the app {named!a}")
    if run.primary_task_type not in ("", TaskType.SERVER_APP):
        raise BundleError(f"the run is of the kind {str(run.primary_task_type)[:100]!a}")
    other = sorted(set(run.override_config) - set(TOLD))
    if other or not all(isinstance(value, str) for value in run.override_config.values()):
        raise BundleError(f"the run's config has {ascii(other[:5])[:300]}")


def check_fab(fab: Fab, fab_hash: str) -> None:
    """Refuse a bundle that is not ours, or not the one that its run names.

    Raises:
        BundleError: Says in what it differs.
    """
    if not fab_hash == fab.hash_str == hashlib.sha256(fab.content).hexdigest():
        raise BundleError("the bundle does not have the hash under which it was sent")
    check_bundle(fab.content)


def tell_operators(node: Mapping[str, Any], run_id: int, why: str) -> None:
    """Write a refusal to the SuperNode's log and to the log of the client's operators."""
    sys.stderr.write(f"refused: {why}\n")
    folder = Path(str(node.get("client", ""))).parent
    try:
        operator_log.record(folder, operator_log.BUNDLE_REFUSED, flower_run=str(run_id), why=why)
    except SilotuneError as error:  # refused all the same
        sys.stderr.write(f"{error}\n")


def main() -> None:
    """Start the SuperNode, unless it cannot be checked."""
    from flwr.supernode.cli import flower_supernode

    told: set[tuple[int, str]] = set()

    def tell(node: Mapping[str, Any], run_id: int, why: str) -> None:
        if (run_id, why) not in told:  # a server that asks again fills no disk
            told.add((run_id, why))
            tell_operators(node, run_id, why)

    try:
        pin(tell)
    except EngineError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    start_own_executor()
    be_patient()
    flower_supernode()


if __name__ == "__main__":
    main()
