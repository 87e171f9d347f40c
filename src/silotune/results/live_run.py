"""What the live page shows of a run: from its folder, whichever process is running it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.core.errors import SilotuneError
from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.federation.live_file import STOPPED, read_live
from silotune.federation.metrics import Row, held_out_losses
from silotune.federation.privacy_statement import privacy_lines, statement
from silotune.federation.run_folder import RunFolder
from silotune.models.base_files import public_name
from silotune.results.charts import MAX_LINES
from silotune.results.live_page import Now, Part
from silotune.results.summary import unit_of

LATE_S = 10.0
"""Seconds after which the page says how old the last news of a run is."""
MOST_ROWS = 200
"""Clients in the table: those that are busy, then the others by name."""
MARKS = {"training": "busy", "scoring": "busy", "failed": "bad", "done": "good"}


class WatchedRun:
    """Looks at a run's folder again and again; what is expensive is computed once per round."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet.

        Raises:
            RunFolderError: It is not a run folder.
        """
        self.folder = RunFolder.open(path)
        self._metrics: tuple[tuple[int, int], list[Row]] = ((0, 0), [])
        self._privacy: tuple[int, list[str]] = (-1, [])

    def look(self, now: float) -> Now:
        """What the page shows.

        Args:
            now: Seconds since 1970.

        Raises:
            RunFolderError: A file is damaged.
        """
        run, live = self.folder.run, read_live(self.folder.path) or {}
        rows = self._rows()
        done = sum(row["event"] == "round" for row in rows)
        finished = (self.folder.path / self.folder.RESULT).is_file()
        state = "done" if finished else str(live.get("state") or STOPPED)
        busy = state == "running"
        clients = live.get("clients", {}) if busy else {}
        return Now(
            kind="run",
            title=f"{public_name(run.model.name)} at {_num_clients(rows, clients)}",
            subtitle=f"{self.folder.path.name}: {counted(run.rounds, 'round')} of "
            f"{getattr(run.algorithm, 'name', '')}, seed {run.seed}",
            state=state,
            headline=_headline(live, now) if busy else _ended(self.folder.path, state, done),
            bar=(done, run.rounds),
            facts=self._facts(live, rows, busy=busy),
            parts=[part for part in self._parts(rows, clients, done) if part is not None],
            log=[(float(at), str(text)) for at, text in live.get("log", [])],
        )

    def _rows(self) -> list[Row]:
        path = self.folder.path / "metrics.jsonl"
        if not path.is_file():
            return []
        about = path.stat()
        key = about.st_mtime_ns, about.st_size
        if self._metrics[0] != key:
            self._metrics = key, self.folder.metrics()
        return self._metrics[1]

    def _facts(
        self, live: Mapping[str, Any], rows: Sequence[Row], *, busy: bool
    ) -> list[tuple[str, str]]:
        done = [row for row in rows if row["event"] == "round"]
        sent = sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in rows)
        losses = held_out_losses(rows)
        found = [
            ("rounds done", f"{len(done)} of {self.folder.run.rounds}"),
            ("sent, both ways", human_bytes(sent)),
            ("time in rounds", human_seconds(sum(row["seconds"] for row in done))),
        ]
        if busy:
            left = live.get("seconds_left")
            found.append(("time left", "–" if left is None else f"about {human_seconds(left)}"))
        if losses:
            newest = max(losses)
            found.append((f"held-out loss, round {newest}", f"{losses[newest]:.3f}"))
        return found

    def _parts(
        self, rows: Sequence[Row], clients: Mapping[str, Any], done: int
    ) -> Sequence[Part | None]:
        return (
            _clients(rows, clients),
            _charts(rows, self.folder.run.rounds, unit_of({"task": self.folder.run.task})),
            self._privacy_part(done),
        )

    def _privacy_part(self, done: int) -> Part | None:
        if self._privacy[0] != done:
            try:
                found = statement(self.folder.run, self.folder)
                self._privacy = done, privacy_lines(found)[:2] if found else []
            except SilotuneError:  # nothing is released yet
                self._privacy = done, []
        lines = self._privacy[1]
        return Part("Privacy spent", "list", lines=lines) if lines else None


def _num_clients(rows: Sequence[Row], clients: Mapping[str, Any]) -> str:
    names = {row["client"] for row in rows if "client" in row} | clients.keys()
    return counted(len(names), "client") if names else "its clients"


def _headline(live: Mapping[str, Any], now: float) -> str:
    silent = now - live["at"]
    old = f" (last news {human_seconds(silent)} ago)" if silent > LATE_S else ""
    return f"{live['headline']}{old}"


def _ended(path: Path, state: str, done: int) -> str:
    if state == "done":
        return f"after {counted(done, 'round')}. Its report is report.html in {path}"
    return f"after {counted(done, 'round')}. To continue: silotune run --resume {path}"


def _clients(rows: Sequence[Row], now: Mapping[str, Any]) -> Part | None:
    """Every client: what it is doing, its losses, and what it sent."""
    names = sorted({row["client"] for row in rows if "client" in row} | now.keys())
    if not names:
        return None
    order = {name: MARKS.get(own["state"]) != "busy" for name, own in now.items()}
    shown = sorted(names, key=lambda name: (order.get(name, True), name))[:MOST_ROWS]
    table = Part("Clients", "table", header=["client", "now", "last round"])
    table.header.extend(["train loss", "held-out loss", "sent"])
    for name in sorted(shown):
        own = [row for row in rows if row.get("client") == name]
        trained = [row for row in own if row["event"] == "train"]
        last = trained[-1] if trained else {}
        doing = now.get(name, {})
        status = str(last.get("status", ""))
        table.rows.append(
            [
                name,
                str(doing.get("words", "")),
                f"{last['round']}: {status}" if last else "",
                _number(last.get("train_loss")),
                _number(next((r.get("loss") for r in reversed(own) if "loss" in r), None)),
                human_bytes(sum(row.get("bytes_up", 0) for row in own)),
            ]
        )
        failed = not doing and status not in ("", "ok", "did not move")
        table.marks.append(MARKS.get(str(doing.get("state")), "bad" if failed else ""))
    return table


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def _charts(rows: Sequence[Row], rounds: int, unit: str) -> Part | None:
    held = _lines(rows, "evaluate", "loss")
    overall = [[r, loss] for r, loss in held_out_losses(rows).items() if math.isfinite(loss)]
    if overall:
        held.append({"name": "all clients", "all": True, "points": overall})
    both = (
        ("Held-out loss", held, "rounds of training (0 = base)"),
        ("Training loss", _lines(rows, "train", "train_loss"), "round"),
    )
    charts = [
        {"title": title, "note": f"{unit}, lower is better", "x": x, "last": rounds, "lines": lines}
        for title, lines, x in both
        if lines
    ]
    return Part("Losses", "charts", charts=charts) if charts else None


def _lines(rows: Sequence[Row], event: str, key: str) -> list[dict[str, Any]]:
    """A line per client, of at most `MAX_LINES`."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        value = row.get(key)
        if row["event"] == event and isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(row["client"], []).append([row["round"], value])
    names = sorted(found)[:MAX_LINES]
    return [{"name": name, "all": False, "points": found[name]} for name in names]
