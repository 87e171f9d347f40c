"""What the live page shows of a client, on its own machine: `client status`, and its log."""

from pathlib import Path

from silotune.core.wording import human_bytes
from silotune.deployment.client_status import (
    client_status,
    state_folder,
    status_lines,
    status_table,
)
from silotune.federation.ledger import lines
from silotune.federation.live_file import read_live
from silotune.federation.outbound_log import FILE as OUTBOUND
from silotune.federation.outbound_log import answer_words
from silotune.results.live_page import Now, Part

MOST_ANSWERS = 20


class WatchedClient:
    """Looks at a client's folder again and again."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet.

        Raises:
            ConfigError: It is not a client's folder.
        """
        self.folder, self._state = folder, state_folder(folder)

    def look(self) -> Now:
        """What the page shows."""
        found, live = client_status(self.folder), read_live(self._state) or {}
        first, *more = status_lines(found)
        now = found["now"]
        states = {True: "connected", False: "not connected"}
        state = states[found["connected"]] if found["joined"] else "not joined"
        header, *rows = status_table(found)
        return Now(
            kind="client",
            title=found["name"],
            subtitle=f"of {found['consortium']}" if found["consortium"] else "",
            state=state,
            headline=first.partition(state)[2].strip("; "),
            bar=(now["round"], now["rounds"]) if now and now["round"] else None,
            facts=[(name, value) for name, _, value in (text.partition(": ") for text in more)],
            parts=[
                Part("Runs", "table", list(header), [list(row) for row in rows], [""] * len(rows)),
                self._sent(),
            ],
            log=[(float(at), str(text)) for at, text in live.get("log", [])],
        )

    def _sent(self) -> Part:
        """The last answers that left this machine."""
        part = Part("What left this machine last", "table", ["time", "answer", "run", "size"])
        answers = [own for own in lines(self._state / OUTBOUND) if "run" in own]
        for line in reversed(answers[-MOST_ANSWERS:]):
            when = str(line["time"]).replace("T", " ").replace("+00:00", " UTC")
            row = [when, answer_words(line), line["run"][:8], human_bytes(line["bytes"])]
            part.rows.append(row)
            part.marks.append("")
        return part
