"""What `silotune server status` shows: clients, runs and what a run is waiting for."""

import fcntl
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.installed import code_sha256, version
from silotune.core.processors import usable_threads
from silotune.core.wording import human_bytes
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.orders import runs_of, state_of
from silotune.federation.roster import CHOSEN, MEMBERS, Roster, versions_seen
from silotune.federation.run_record import RunRecord
from silotune.runtime.flower.engine_command import CONNECTION, engine_environment, flwr
from silotune.runtime.flower.server_reports import PROGRESS

if TYPE_CHECKING:
    from silotune.federation.metrics import Row


def status(folder: Path) -> dict[str, Any]:
    """The present state of a consortium's server.

    Returns:
        name, up, fingerprint, clients (name, online, since: when it connected or left, if that is
        known, version and same_code: what it said of its silotune at its last run, and whether that
        is the server's), runs (name, id, state, why, round, rounds, bytes, seconds_left,
        waiting_for, waiting_for_consent). A client knows a run by its id: `silotune client
        outbound` shows the first eight digits.
    """
    consortium, clients = Consortium.open(folder), clients_of(folder)
    away = [own["name"] for own in clients if not own["online"]]
    return {
        "name": consortium.about.name,
        "up": is_up(folder),
        "fingerprint": consortium.fingerprint(),
        "clients": clients,
        "runs": runs_now(folder, away),
    }


def is_up(folder: Path) -> bool:
    """Whether a consortium's server is up."""
    return _is_up((folder / MEMBERS).parent.absolute())


def clients_of(folder: Path) -> list[dict[str, Any]]:
    """The clients of `status`. Asks the engine, which takes a second or more of a processor."""
    engine, members = (folder / MEMBERS).parent.absolute(), folder / MEMBERS
    seen = _online(engine) if _is_up(engine) else {}
    nodes = Roster(members).nodes() if members.is_file() else {}
    found: list[dict[str, Any]] = []
    versions = versions_seen(members)
    for name in Consortium.open(folder).members():
        node = seen.get(str(nodes.get(name)), {})
        online = node.get("status") == "online"
        since = node.get("online-at" if online else "offline-at")
        said = versions.get(name, {"version": "", "code_sha256": ""})
        own = {"name": name, "online": online, "since": since or None, "version": said["version"]}
        same = (said["version"], said["code_sha256"]) == (version(), code_sha256())
        found.append({**own, "same_code": same if said["version"] else None})
    return found


def runs_now(folder: Path, away: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The runs of `status`. Before its first round, a run waits for the clients that are away."""
    engine = (folder / MEMBERS).parent.absolute()
    return [_run(path, engine, away) for path in runs_of(folder).values()]


def status_tables(now: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """`status` as tables for people."""
    clients = [
        (c["name"], "online" if c["online"] else "away", version_words(c)) for c in now["clients"]
    ]
    runs: list[tuple[str, ...]] = []
    for run in now["runs"]:
        left = run["seconds_left"]
        runs.append(
            (
                run["name"],
                run["id"][:8],
                run["state"],
                f"{run['round']}/{run['rounds']}",
                human_bytes(run["bytes"]),
                "" if left is None else f"{left / 60:.0f} min",
                waiting_words(run) or run["why"],
            )
        )
    tables: list[list[tuple[str, ...]]] = [[("client", "now", "silotune"), *clients]]
    if runs:
        tables.append(
            [("run", "id", "state", "rounds", "sent, both ways", "left", "waiting for"), *runs]
        )
    return tables


def version_words(client: Mapping[str, Any]) -> str:
    """A client's version of silotune as it said at its last run, and whether it differs."""
    said = client["version"]
    return f"{said}, differs from the server's" if client["same_code"] is False else said


def _is_up(engine: Path) -> bool:
    lock = engine / "up.lock"
    if not lock.exists():
        return False
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _online(engine: Path) -> dict[str, dict[str, Any]]:
    environment = engine_environment(
        engine / "flwr", private=engine / "flwr", runs=engine / "runs", threads=usable_threads()
    )
    words = ("supernode", "list", CONNECTION, "--format", "json")
    answer = flwr(words, environment=environment, log=engine / "logs" / "flwr.log")
    return {node["node-id"]: node for node in answer.get("nodes") or []}


def _run(path: Path, engine: Path, away: Sequence[str]) -> dict[str, Any]:
    folder = RunRecord(path)
    rounds = folder.rounds()
    rows = folder.metrics()
    done = [row for row in rows if row["event"] == "round"]
    now = state_of(path)
    left = rounds - len(done)
    waiting, consent = _waiting(engine / "runs" / folder.run_id() / PROGRESS)
    if waiting is None:  # before the first round, a run waits for clients to connect
        only = folder.read_json(CHOSEN)
        waiting = [name for name in away if only is None or name in only]
    return {
        "name": path.name,
        "id": folder.run_id(),
        "state": now["state"],
        "why": now["why"],
        "round": len(done),
        "rounds": rounds,
        "bytes": sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in rows),
        "seconds_left": _seconds_left(done, left) if now["state"] == "running" else None,
        "waiting_for": waiting if now["state"] == "running" else [],
        "waiting_for_consent": consent if now["state"] == "running" else [],
    }


def waiting_words(run: Mapping[str, Any]) -> str:
    """Whom a run of `status` waits for; clients whose people have to agree come last."""
    consent = run["waiting_for_consent"]
    others = [name for name in run["waiting_for"] if name not in consent]
    said = [", ".join(others)] if others else []
    return "; ".join([*said, f"consent of {', '.join(consent)}"] if consent else said)


def _seconds_left(done: "list[Row]", left: int) -> float | None:
    """Estimate, from the median of the last rounds; None before the first."""
    return left * statistics.median(row["seconds"] for row in done[-5:]) if done else None


def _waiting(progress: Path) -> tuple[list[str] | None, list[str]]:
    """Who was asked and has not answered (None before round 1), and who waits for consent."""
    waiting: set[str] | None = None
    consent: list[str] = []
    if not progress.is_file():
        return None, consent
    for line in progress.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # each process begins with an empty line; the last one may be half
            continue
        if event["event"] == "started":
            consent = []
        elif event["event"] == "waits_for_consent":
            consent = event["clients"]
        elif event["event"] == "begin_round":
            waiting = set(event["cohort"])
        elif waiting is not None and event["event"] in ("client_done", "client_failed"):
            waiting.discard(event["client"])
        elif event["event"] == "end_round":
            waiting = set()
    return None if waiting is None else sorted(waiting), consent
