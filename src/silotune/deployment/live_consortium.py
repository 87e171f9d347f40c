"""What the live page shows of a consortium: its server, queue and clients, and the present run."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from silotune.core.errors import SilotuneError
from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.orders import FAILED, RUNNING, WAITING, find_run
from silotune.deployment.status import clients_of, is_up, runs_now, version_words, waiting_words
from silotune.results.live_page import Now, Part
from silotune.results.live_run import WatchedRun

ASK_S = 30.0
"""Seconds between two questions to the engine about its clients, while somebody watches: each takes
a second or more of a processor."""
MARKS = {RUNNING: "busy", FAILED: "bad"}


class WatchedConsortium:
    """Looks at a consortium's folder again and again."""

    def __init__(self, folder: Path) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: It is not a consortium's folder.
        """
        self.folder, self._name = folder, Consortium.open(folder).about.name
        self._clients: list[dict[str, Any]] | None = None
        self._due, self._asking = 0.0, threading.Lock()
        self._run: WatchedRun | None = None

    def look(self) -> Now:
        """What the page shows."""
        self._ask_in_background()
        runs, clients, up = runs_now(self.folder), self._clients, is_up(self.folder)
        here = [run for run in runs if run["state"] == RUNNING] or runs[-1:]
        found = Now(
            kind="consortium",
            title=self._name,
            subtitle=f"{counted(len(runs), 'run')}, "
            f"{sum(run['state'] == WAITING for run in runs)} waiting",
            state="up" if up else "not up",
            headline="" if up else f"start it: silotune server up --folder {self.folder}",
            parts=[_clients(clients), _runs(runs)],
        )
        return found if not here else self._with_run(found, here[-1])

    def _with_run(self, found: Now, run: dict[str, Any]) -> Now:
        """The page with a run below: its clients, losses and log."""
        path = find_run(self.folder, run["name"])
        if self._run is None or self._run.folder.path != path:
            self._run = WatchedRun(path)
        now = self._run.look(time.time())
        running = run["state"] == RUNNING and found.state == "up"
        own = [replace(part, title=f"{part.title}, {run['name']}") for part in now.parts]
        waiting = waiting_words(run)
        facts = [("run", run["name"]), *now.facts]
        if waiting and running:
            facts.append(("waiting for", waiting))
        return replace(
            found,
            headline=f"{run['name']}: {now.headline}" if running else found.headline,
            bar=now.bar if running else None,
            facts=facts,
            parts=[*found.parts, *own],
            log=now.log,
        )

    def _ask_in_background(self) -> None:
        if time.monotonic() >= self._due and self._asking.acquire(blocking=False):
            threading.Thread(target=self._ask, name="clients", daemon=True).start()

    def _ask(self) -> None:
        try:
            self._clients = clients_of(self.folder)
        except SilotuneError:  # the engine did not answer; it is asked again
            pass
        finally:
            self._due = time.monotonic() + ASK_S
            self._asking.release()


def _clients(clients: list[dict[str, Any]] | None) -> Part:
    part = Part(
        "Clients of the consortium", "table", header=["client", "connection", "since", "silotune"]
    )
    for own in clients or []:
        part.rows.append(
            [
                own["name"],
                "online" if own["online"] else "away",
                own["since"] or "unknown",
                version_words(own),
            ]
        )
        part.marks.append("good" if own["online"] else "")
    if clients is None:
        part.rows.append(["", "asking", "", ""])
        part.marks.append("")
    return part


def _runs(runs: list[dict[str, Any]]) -> Part:
    part = Part("Runs", "table", header=["run", "state", "rounds", "sent", "left"])
    for run in reversed(runs):
        left = run["seconds_left"]
        part.rows.append(
            [
                run["name"],
                f"{run['state']}: {run['why']}" if run["why"] else run["state"],
                f"{run['round']} of {run['rounds']}",
                human_bytes(run["bytes"]),
                "" if left is None else f"about {human_seconds(left)}",
            ]
        )
        part.marks.append(MARKS.get(run["state"], ""))
    return part
