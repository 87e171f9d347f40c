"""What has left a client's machine, and a limit on it: outbound.jsonl in the client's own folder.

This is an append-only file of JSON lines. Each line is written before its answer is sent, so that
nothing leaves without a record; what cannot be recorded is not sent. Names and shapes of tensors,
and the recipe that was asked for, are long and the same in every round, so they are on separate
lines, which others name by their hash.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.errors import ConfigError, Declined
from silotune.core.reading_back import read_toml
from silotune.core.safe_text import one_line
from silotune.core.wording import counted
from silotune.federation.ledger import lines, write_down

if TYPE_CHECKING:
    import numpy as np  # imported where it is used: listing what was sent needs none

FILE = "outbound.jsonl"
MOST_REFUSED, LONGEST_REFUSED = 50, 200_000
"""How many recipes that were refused are kept, and of what length: a server can send any number."""
OWN = "client.toml"
"""A client's own configuration, in its folder."""
SUMS = {
    "keys": "keys for a secure sum",
    "shares": "shares for the other clients",
    "opened": "shares that open the sum",
}
"""What answers of secure sums are called."""
OWN_REASONS = ("declined", "refused by the client")
"""Failures whose reason is a decision of this client, and is shown in full."""


def record_of(folder: Path) -> Path:
    """The record of the client that a folder belongs to.

    Only the key that says where it is is read: checking the others loads torch, and whoever wants
    to see what was sent should not have to fix a mistake elsewhere first.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    path = folder / OWN
    table = read_toml(path, fix="Name a client's folder, or fix the file.", error=ConfigError)
    state = table.get("state", "state")
    if not isinstance(state, str):
        raise ConfigError(f"mistakes in {path}:\n  state: must be the path of a folder.")
    return folder / Path(state).expanduser() / FILE


@dataclass(frozen=True)
class Outbound:
    """One run's part of a client's record of what has left."""

    path: Path
    run_id: str
    max_bytes: int | None = None
    """Limit for the whole run; None: no limit."""

    def sent(self) -> list[dict[str, Any]]:
        """This run's answers so far."""
        return [line for line in lines(self.path) if line.get("run") == self.run_id]

    def seconds_training(self) -> float:
        """Time spent on training for this run, including failed rounds."""
        return sum(line["seconds"] for line in self.sent() if line["asked"] == "train")

    def last_update(self, *, before: int) -> int | None:
        """The newest round before this one whose update has left; None if none has."""
        said = (line["said"].get("update") for line in self.sent())
        rounds = [int(update["round"]) for update in said if update is not None]
        return max((r for r in rounds if r < before), default=None)

    def let_out(
        self,
        about: Mapping[str, Any],
        values: "np.ndarray",
        *,
        asked: str,
        seconds: float,
        recipe: str = "",
    ) -> None:
        """Record an answer before it is sent.

        Args:
            about: All texts and counts of the answer.
            values: The bytes of the answer's tensors.
            asked: query, train or evaluate.
            seconds: How long it took to produce the answer.
            recipe: What the server wanted to be done, as it was sent.

        Raises:
            Declined: The answer would exceed the limit. It is not recorded and must not be sent.
            DiskError: The answer cannot be recorded.
        """
        size = values.nbytes + len(json.dumps(about).encode())
        before = sum(line["bytes"] for line in self.sent())
        # a client may always report that it failed
        if self.max_bytes is not None and "failure" not in about and before + size > self.max_bytes:
            raise Declined(
                f"limits.max_bytes = {self.max_bytes} of this client: it has sent "
                f"{counted(before, 'byte')} in this run, and this answer would add {size}"
            )
        said = {k: v for k, v in about.items() if k != "update"}
        update = about.get("update")
        if update is not None:
            said["update"] = {k: v for k, v in update.items() if k != "tensors"}
        # who, and not what: the logs of many clients together could open a sum
        if "shares" in about:
            said["shares"] = sorted(about["shares"])
        if "opened" in about:
            said["opened"] = {
                kind: own if kind == "keys" else sorted(own)
                for kind, own in about["opened"].items()
            }
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {
            "time": now,
            "run": self.run_id,
            "asked": asked,
            "bytes": size,
            "bytes_numbers": values.nbytes,
            "seconds": round(seconds, 3),
            "said": said,
        }
        if recipe:  # what a number means depends on what was asked
            line["recipe"] = self._recipe(recipe, refused="failure" in about)
        if update is not None:
            line["tensors"] = self._layout(update["tensors"])
            if recipe:
                line["as"] = _written_as(recipe)
            # what a codec or a mask makes of a change has no norm that says anything
            if all(len(listed) == 3 for listed in update["tensors"]):
                import numpy as np

                line["norm"] = float(np.linalg.norm(values.view(np.float32).astype(np.float64)))
            line["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
        write_down(self.path, line)

    def _layout(self, tensors: Any) -> str:
        """The hash of a list of names, shapes and types, which is recorded the first time."""
        layout = {f"{group}/{name}": [*shape, *type_] for group, name, shape, *type_ in tensors}
        return self._once("layout", json.dumps(layout), {"shapes": layout})

    def _recipe(self, text: str, *, refused: bool) -> str:
        """The hash of a recipe. Its text is recorded the first time, within the limits above."""
        if not refused:
            return self._once("recipe_sha256", text, {"text": text})
        before = sum(bool(line.get("refused")) for line in lines(self.path))
        if before >= MOST_REFUSED or len(text) > LONGEST_REFUSED:
            return hashlib.sha256(text.encode()).hexdigest()
        return self._once("recipe_sha256", text, {"text": text, "refused": True})

    def _once(self, kind: str, text: str, facts: Mapping[str, Any]) -> str:
        """The hash of a text; the facts behind it are recorded the first time it is seen."""
        key = hashlib.sha256(text.encode()).hexdigest()
        if not any(line.get(kind) == key for line in lines(self.path)):
            write_down(self.path, {kind: key, **facts})
        return key


def _written_as(recipe: str) -> str:
    """How a recipe lets a change be written: `wire.up`, or masked."""
    asked = json.loads(recipe)
    if asked.get("secure_sum", {}).get("kind", "none") != "none":
        return "masked"
    return str(asked.get("wire", {}).get("up", "float32"))


def answer_words(line: Mapping[str, Any]) -> str:
    """What an answer was, in a few words, from its line."""
    said = line["said"]
    if "failure" in said:
        failure = said["failure"]
        code, why = str(failure.get("code", "")), ""
        if code in OWN_REASONS:  # what the people of this client can change
            why = f": {one_line(' '.join(str(failure.get('place', '')).split()))}"
        return f"round {failure.get('round', 0)}: failure: {code}{why}"
    if "update" in said:
        way = line.get("as", "float32")
        way = {"float32": "", "masked": ", masked"}.get(way, f" as {way}")
        return f"round {said['update']['round']}: update{way}"
    if part := next((part for part in SUMS if part in said), None):
        return f"round {said.get('round', 0)}: {SUMS[part]}"
    if "report" in said:
        return "report on its number of rows"
    return f"answer to {line['asked']}"


def sent_by_run(path: Path) -> list[dict[str, Any]]:
    """What has left, per run, oldest run first: run, first, last, answers, updates, bytes.

    `bytes_of_updates` are the numbers of updates alone, which the server counts as bytes_up; None
    if an earlier version of silotune wrote some of the lines. `bytes` has all answers with their
    texts.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in lines(path):
        if "run" not in line:
            continue
        own = found.setdefault(
            line["run"],
            {"run": line["run"], "first": line["time"], "answers": 0, "updates": 0, "bytes": 0}
            | {"bytes_of_updates": 0},
        )
        own["last"] = line["time"]
        own["answers"] += 1
        if "update" in line["said"]:
            own["updates"] += 1
            numbers, before = line.get("bytes_numbers"), own["bytes_of_updates"]
            own["bytes_of_updates"] = None if None in (numbers, before) else before + numbers
        own["bytes"] += line["bytes"]
    return list(found.values())
