"""Messages on their way over Flower's Grid: sent, kept as open questions, and read when answered.

Does not know who takes part (`members.py`) or what an answer means (`server.py`).
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from silotune.core.errors import UpdateError
from silotune.core.types import Broadcast, Failure
from silotune.runtime import wire
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.payload import Parcel

TTL_S = 30 * 86400.0
"""Flower silently drops replies older than this, so it is longer than any run."""
AT_ONCE, AT_ONCE_BYTES = 16, 64e6
"""Most replies to fetch in one call, and most bytes, but always at least one reply. This bounds
memory, no matter how many clients answer."""
MOST_TEXT, TEXT_PER_TENSOR = 1_000_000, 1000
"""Most characters of an answer's text, and how many more for each tensor. It is not in a round's
bytes, so it must stay small beside them; ten thousand labels' counts need a third of it."""
NOT_REACHABLE = 5
ENGINE_CODES = {
    1: "client app not loaded",
    2: "client app failed",
    3: "message lost",
    4: "reply lost",
    5: "not reachable",
    7: "client app refused",
    8: "client app ended",
}
"""What Flower's error codes mean. Its texts are not passed on: they may hold exception texts."""


@dataclass(frozen=True)
class Question:
    """A message on its way."""

    kind: str
    """query, train, evaluate, or one of the messages of secure sums (`sum_wire.STEPS`)."""
    node: int
    client: str
    round: int
    bytes_down: int = 0
    num_tensors: int = 0
    """Of the adapter: an answer is about the same ones."""
    adapter_bytes: int = 0
    """Of the whole adapter: an answer is about as large."""


Answer = tuple[Question, Parcel | Failure]
"""What came back, or why nothing usable did, with the question it belongs to."""


class Contents:
    """The records of a round's messages. What several clients are sent is encoded once."""

    def __init__(
        self,
        messages: Mapping[str, Broadcast],
        beside: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Nothing is encoded yet.

        Args:
            messages: What each client is sent.
            beside: Further text for a client, by its name.
        """
        self._messages, self._beside = messages, beside or {}
        self._num_uses = Counter(map(id, messages.values()))
        self._parcels: dict[int, Parcel] = {}
        self._records: dict[int, RecordDict] = {}

    def record(self, client: str) -> RecordDict:
        """What this client receives."""
        key = id(self._messages[client])
        if more := self._beside.get(client):
            parcel = self._parcel(client)
            return to_record(Parcel({**parcel.about, **more}, parcel.values))
        if key not in self._records:
            record = to_record(self._parcel(client))
            if self._num_uses[key] == 1:  # large, and not needed again
                return record
            self._records[key] = record
        return self._records[key]

    def _parcel(self, client: str) -> Parcel:
        key = id(self._messages[client])
        if key in self._parcels:
            return self._parcels[key]
        parcel = wire.encode_broadcast(self._messages[client])
        if self._beside and self._num_uses[key] > 1:
            self._parcels[key] = parcel
        return parcel


class Mailbox:
    """Owns the Grid and the open questions."""

    def __init__(self, grid: Grid, *, window: int | None = None) -> None:
        """Nothing is sent yet.

        Args:
            grid: Flower's connection to the nodes.
            window: Most messages on their way at once; None for any number.
        """
        self.processes: dict[str, dict[str, Any]] = {}
        """What each process that answered reports about itself, by its id."""
        self._grid, self._window = grid, window
        self._open: dict[str, Question] = {}

    def nodes(self) -> set[int]:
        """The nodes that are connected now."""
        return set(self._grid.get_node_ids())

    def room(self) -> int | None:
        """How many messages may be sent now; None for any number."""
        return None if self._window is None else max(0, self._window - len(self._open))

    def is_open(self, message: str) -> bool:
        """Whether a message has had no answer so far."""
        return message in self._open

    def unanswered(self, kind: str) -> set[int]:
        """The nodes that have not answered a question of this kind."""
        return {question.node for question in self._open.values() if question.kind == kind}

    def send(
        self, questions: Sequence[Question], record_of: Callable[[str], RecordDict]
    ) -> tuple[dict[str, Question], list[Answer]]:
        """Send each question's client its record.

        Returns:
            The questions sent, by the id of their message; and those that could not be sent, each
            with its failure.
        """
        messages = [
            Message(record_of(q.client), q.node, q.kind, ttl=TTL_S, group_id=str(q.round))
            for q in questions
        ]
        # Flower returns an empty list if it could send nothing, and None for a message it could not
        ids: list[str | None] = list(self._grid.push_messages(messages)) or [None] * len(questions)
        pairs = list(zip(ids, questions, strict=True))
        sent = {message: question for message, question in pairs if message}
        self._open.update(sent)
        return sent, [(q, _engine_failure(q, 3)) for message, q in pairs if not message]

    def take(self) -> Iterator[Answer]:
        """Yield the answers that have arrived, fetched a few at a time."""
        ids = list(self._open)
        largest = max((question.adapter_bytes for question in self._open.values()), default=0)
        some = max(1, min(AT_ONCE, int(AT_ONCE_BYTES // max(largest, 1))))
        for at in range(0, len(ids), some):
            for reply in self._grid.pull_messages(ids[at : at + some]):
                question = self._open.pop(reply.metadata.reply_to_message_id, None)
                if question is not None:  # otherwise it has been read before
                    yield question, self._read(reply, question)
            reply = None  # release it before the next one is fetched: it may be large

    def _read(self, reply: Message, question: Question) -> Parcel | Failure:
        if reply.has_error():
            return _engine_failure(question, reply.error.code)
        try:
            most = MOST_TEXT + TEXT_PER_TENSOR * question.num_tensors
            parcel = from_record(reply.content, most_text=most)
        except UpdateError as error:
            return Failure(question.client, question.round, "unreadable", str(error))
        with contextlib.suppress(UpdateError):
            process = wire.decode_process(parcel)
            self.processes[process["id"]] = process
        return parcel


def _engine_failure(question: Question, code: int) -> Failure:
    meaning = ENGINE_CODES.get(code, "engine error")
    return Failure(question.client, question.round, meaning, f"Flower's error code {code}")
