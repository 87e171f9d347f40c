"""What has left a client's machine, and a limit on it: outbound.jsonl in the client's own folder.

A file of JSON lines that only grows. A line is written before its answer is sent, so that nothing
leaves unseen; what cannot be written down does not leave. Names and shapes of tensors are long and
the same in every round, so they have a line of their own, which the others name by its hash.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from silotune.core.errors import Declined
from silotune.federation.ledger import lines, write_down

FILE = "outbound.jsonl"


@dataclass(frozen=True)
class Outbound:
    """One run's part of a client's list of what has left."""

    path: Path
    run_id: str
    max_bytes: int | None = None
    """Of the whole run; None: no limit."""

    def sent(self) -> list[dict[str, Any]]:
        """This run's answers so far."""
        return [line for line in lines(self.path) if line.get("run") == self.run_id]

    def seconds_training(self) -> float:
        """What training for this run has taken here, failed rounds included."""
        return sum(line["seconds"] for line in self.sent() if line["asked"] == "train")

    def let_out(
        self, about: Mapping[str, Any], values: np.ndarray, *, asked: str, seconds: float
    ) -> None:
        """Write an answer down, before it is sent.

        Args:
            about: All its texts and counts.
            values: Its numbers, float32.
            asked: query, train or evaluate.
            seconds: What it took.

        Raises:
            Declined: It would go beyond the limit; nothing is written, and nothing must be sent.
            DiskError: It cannot be written down.
        """
        size = values.nbytes + len(json.dumps(about).encode())
        before = sum(line["bytes"] for line in self.sent())
        # that it has failed may always be said
        if self.max_bytes is not None and "failure" not in about and before + size > self.max_bytes:
            raise Declined(
                f"limits.max_bytes = {self.max_bytes} of this client: {before} bytes have left in "
                f"this run, and this answer is of {size}"
            )
        said = {k: v for k, v in about.items() if k != "update"}
        update = about.get("update")
        if update is not None:
            said["update"] = {k: v for k, v in update.items() if k != "tensors"}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {
            "time": now,
            "run": self.run_id,
            "asked": asked,
            "bytes": size,
            "seconds": round(seconds, 3),
            "said": said,
        }
        if update is not None:
            line["tensors"] = self._layout(update["tensors"])
            line["norm"] = float(np.linalg.norm(values.astype(np.float64)))
            line["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
        write_down(self.path, line)

    def _layout(self, tensors: Any) -> str:
        """The hash by which a list of names and shapes is known; written down the first time."""
        layout = {f"{group}/{name}": list(shape) for group, name, shape in tensors}
        key = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        if not any(line.get("layout") == key for line in lines(self.path)):
            write_down(self.path, {"layout": key, "shapes": layout})
        return key


def sent_by_run(path: Path) -> list[dict[str, Any]]:
    """What has left by run, the first one first: run, first, last, answers, updates, bytes."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines(path):
        if "run" not in line:
            continue
        own = found.setdefault(
            line["run"],
            {"run": line["run"], "first": line["time"], "answers": 0, "updates": 0, "bytes": 0},
        )
        own["last"] = line["time"]
        own["answers"] += 1
        own["updates"] += "update" in line["said"]
        own["bytes"] += line["bytes"]
    return list(found.values())
