"""What a client sees of itself: connected or not, run, round, last answer, what is left of budgets.

Everything is read from files in its own folder: the kit, client.toml, and in the state folder
connection.json (by `join`), live.json (by the worker), outbound.jsonl and privacy.jsonl. This file
imports no torch, so that the answer comes at once.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import write_json
from silotune.core.errors import ConfigError
from silotune.core.reading_back import parse_object, parse_toml, read_toml
from silotune.core.safe_text import one_line
from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.federation import operator_log
from silotune.federation.approval_files import WAITING, requests
from silotune.federation.ledger import lines
from silotune.federation.live_file import RUNNING, is_alive, read_live
from silotune.federation.outbound_log import FILE as OUTBOUND
from silotune.federation.outbound_log import answer_words

OWN, KIT, CONNECTION = "client.toml", "kit.toml", "connection.json"
EVERY_S = 10.0
"""Seconds between two lines about the same training."""
FIX = "Correct it, or restore it from a copy."


def state_folder(folder: Path) -> Path:
    """Where a client keeps what it keeps.

    Raises:
        ConfigError: The folder is not a client's, or its client.toml is damaged.
    """
    if not (folder / OWN).is_file():
        raise ConfigError(
            f"{folder} has no {OWN}, so it is not the folder of a client that has joined.\n"
            "  Give the folder that `silotune client init` created, after the first "
            "`doctor` or `join`."
        )
    table = read_toml(folder / OWN, fix=FIX, error=ConfigError)
    return folder / Path(str(table.get("state", "state"))).expanduser()


def write_connection_state(state: Path, consortium: str, *, connected: bool) -> None:
    """Record whether `join` is connected."""
    import os

    facts = {"pid": os.getpid(), "connected": connected, "since": time.time()}
    with contextlib.suppress(OSError):
        write_json(state / CONNECTION, {**facts, "consortium": consortium})


def forget_connection_state(state: Path) -> None:
    """Record that `join` has ended."""
    with contextlib.suppress(OSError):
        (state / CONNECTION).unlink()


def client_status(folder: Path) -> dict[str, Any]:
    """The present state of a client.

    Args:
        folder: The client's.

    Returns:
        name, fingerprint (of its key; "" before there is a kit), joined (whether `join` is
        running), connected, since (seconds since 1970), consortium, now (run, round, rounds,
        headline, at; None without a worker), last (time, run and words of the last answer; None
        before the first), and runs: for each run its id, when it began and ended, answers, bytes,
        seconds of training, and what is left of limits.max_bytes and limits.max_hours (None
        without a limit). And epsilon: the limit and the number of releases; None without a limit.
        And refused: time and reason of every bundle of the server that this client did not start.
        And asks: run and time of every run that waits for this client's consent, and changed:
        whether an answer was given to another recipe of it.

    Raises:
        ConfigError: See `state_folder`.
    """
    state = state_folder(folder)
    table = read_toml(folder / OWN, fix=FIX, error=ConfigError)
    limits = table.get("limits", {})
    line, live = _connection(state), read_live(state)
    sent = [own for own in lines(state / OUTBOUND) if "run" in own]
    return {
        "name": str(table.get("name", folder.name)),
        "fingerprint": own_fingerprint(folder),
        "joined": line is not None,
        "connected": bool(line and line["connected"]),
        "since": line and line["since"],
        "consortium": line and line["consortium"],
        "now": _now(live) if live and live["state"] == RUNNING else None,
        "last": _answer(sent[-1]) if sent else None,
        "runs": _by_run(sent, limits),
        "epsilon": _epsilon(state, limits),
        "asks": _asks(state),
        "refused": [
            {"time": str(row.get("time")), "why": str(row.get("why"))}
            for row in operator_log.entries(folder, operator_log.BUNDLE_REFUSED)
        ],
    }


def own_fingerprint(folder: Path) -> str:
    """What the people of other clients and of the server know this client by; "" without a kit."""
    from cryptography import x509

    from silotune.runtime.fingerprint import fingerprint

    try:
        kit = parse_toml((folder / KIT).read_text(encoding="utf-8"))
        own = x509.load_pem_x509_certificate(str(kit["certificate"]).encode())
        return fingerprint(own.public_key())
    except (OSError, ValueError, KeyError):
        return ""


def _connection(state: Path) -> dict[str, Any] | None:
    """What `join` has recorded; None unless it is running."""
    try:
        found = parse_object((state / CONNECTION).read_text(encoding="utf-8"))
        return found if is_alive(int(found["pid"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _now(live: Mapping[str, Any]) -> dict[str, Any]:
    own = next(iter(live["clients"].values()), {})
    return {
        **{key: live.get(key) for key in ("run", "round", "rounds", "at")},
        "headline": live["headline"],
        "words": own.get("words", ""),
    }


def _answer(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: line[key] for key in ("time", "run", "bytes")},
        "words": answer_words(line),
    }


def _by_run(sent: list[dict[str, Any]], limits: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line in sent:
        new = {"run": line["run"], "first": line["time"], "answers": 0, "bytes": 0, "seconds": 0.0}
        own = found.setdefault(line["run"], new)
        own["last"] = line["time"]
        own["answers"] += 1
        own["bytes"] += line["bytes"]
        own["seconds"] += line["seconds"] if line["asked"] == "train" else 0.0
    most, hours = limits.get("max_bytes"), limits.get("max_hours")
    for own in found.values():
        own["bytes_left"] = None if most is None else max(0, most - own["bytes"])
        own["seconds_left"] = None if hours is None else max(0.0, hours * 3600 - own["seconds"])
    return list(found.values())


def _asks(state: Path) -> list[dict[str, Any]]:
    return [
        {"run": own.run, "time": own.time, "changed": own.changed}
        for own in requests(state)
        if own.state == WAITING
    ]


def _epsilon(state: Path, limits: Mapping[str, Any]) -> dict[str, Any] | None:
    if limits.get("epsilon") is None:
        return None
    return {"limit": limits["epsilon"], "releases": len(lines(state / "privacy.jsonl"))}


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """`client_status` for people."""
    name, last, now = found["name"], found["last"], found["now"]
    if not found["joined"]:
        said = [f"{name}: not joined; `silotune client join` is not running"]
    else:
        state = "connected" if found["connected"] else "not connected"
        since = human_seconds(time.time() - found["since"])
        said = [f"{name}: {state} to {found['consortium']} for {since}"]
    if found["fingerprint"]:
        said.append(f"fingerprint: {found['fingerprint']}")
    if now is not None:
        run = f"run {str(now['run'])[:8]}: " if now["run"] else ""
        said.append(f"now: {run}{_doing(now)}")
    if last is not None:
        ago = time.time() - datetime.fromisoformat(last["time"]).timestamp()
        size = human_bytes(last["bytes"])
        said.append(f"last answer: {last['words']}, {size}, {human_seconds(ago)} ago")
    else:
        said.append("last answer: none so far")
    if found["epsilon"] is not None:
        own = found["epsilon"]
        said.append(f"privacy: at most epsilon {own['limit']:g}; {own['releases']} releases so far")
    said += [f"asks: {asks_words(own['run'], changed=own['changed'])}" for own in found["asks"]]
    if found["refused"]:
        said.append(refused_words(found["refused"]))
    return said


def asks_words(run: str, *, changed: bool) -> str:
    """What an administrator has to do about a run."""
    why = ", because its recipe has changed since you answered" if changed else ""
    return f"run {run[:8]} waits for your consent{why}: silotune client approve {run[:8]}"


def refused_words(refused: Sequence[Mapping[str, str]]) -> str:
    """What an administrator must know: the server wanted something else to run here."""
    last, times = refused[-1], counted(len(refused), "time")
    return (
        f"REFUSED {times}: the server sent something to run that is not this package's bundle; "
        f"last at {last['time']}: {one_line(last['why'])}. Nothing of it was started. Ask the "
        "server's operators"
    )


def status_table(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What was sent and what is left, one row per run, newest first."""
    rows = [("run", "answers", "sent", "sending left", "trained", "training left")]
    for own in reversed(found["runs"]):
        size, hours = own["bytes_left"], own["seconds_left"]
        rows.append(
            (
                *(own["run"][:8], str(own["answers"]), human_bytes(own["bytes"])),
                "no limit" if size is None else human_bytes(size),
                human_seconds(own["seconds"]),
                "no limit" if hours is None else human_seconds(hours),
            )
        )
    return rows


def _doing(now: Mapping[str, Any]) -> str:
    if not now["round"]:
        return str(now["headline"])
    return f"round {now['round']} of {now['rounds']}, {now['words']}"


class Activity:
    """Reports what a client does, for the output of `join`."""

    def __init__(self, folder: Path, state: Path) -> None:
        """What was sent or refused before is no news."""
        self._state, self._due, self._said = state, 0.0, ""
        self._folder, self._refused = folder, len(self._refusals(folder))
        self._asked: set[tuple[str, str]] = set()
        path = state / OUTBOUND
        self._at = path.stat().st_size if path.exists() else 0

    def news(self) -> Iterator[str]:
        """Lines since the last call: answers, and from time to time the steps of a training."""
        yield from self._answers()
        for own in requests(self._state):
            if own.state == WAITING and (key := (own.run, own.sha256)) not in self._asked:
                self._asked.add(key)
                yield asks_words(own.run, changed=own.changed)
        refused = self._refusals(self._folder)
        if len(refused) > self._refused:
            self._refused = len(refused)
            yield refused_words(refused)
        if time.monotonic() < self._due or (live := read_live(self._state)) is None:
            return
        now = _now(live)
        if live["state"] == RUNNING and now["round"] and now["words"]:
            text = f"run {str(now['run'])[:8]}: {_doing(now)}"
            self._due = time.monotonic() + EVERY_S
            if text != self._said:
                self._said = text
                yield text

    @staticmethod
    def _refusals(folder: Path) -> list[dict[str, Any]]:
        return operator_log.entries(folder, operator_log.BUNDLE_REFUSED)

    def _answers(self) -> Iterator[str]:
        path = self._state / OUTBOUND
        if not path.exists() or path.stat().st_size <= self._at:
            return
        with path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        for text in whole.decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if "run" in line:
                    size = human_bytes(line["bytes"])
                    yield f"run {line['run'][:8]}: sent {answer_words(line)}, {size}"
