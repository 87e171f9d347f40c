"""Rows that occur more than once: within a client, between clients, in train and held-out parts.

Compares digests of texts, so it finds identical texts only, not the same content in other words.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from silotune.data.client_rows import ClientRows
from silotune.data.conversations import Message
from silotune.data.labelled_texts import LabelledText
from silotune.data.preferences import ANSWERS, is_pair
from silotune.data.reading import TaskRow

SERVER = ""
"""Name under which the server trains on its rows; no client has an empty name."""


@dataclass(frozen=True)
class Duplicates:
    """Rows of one client that occur more than once. Rows are equal if all their texts are.

    Everyone who trains counts: all clients, and the server if it has rows.
    """

    num_repeated: int
    """Train rows that equal an earlier train row of the same client."""
    num_elsewhere: int
    """Train rows that someone else also trains on."""
    num_leaked_own: int
    """Held-out rows that the same client trains on."""
    num_leaked: int
    """Held-out rows that anyone trains on."""
    num_other_answer: int
    """Train rows whose question has a different answer, or label, in anyone's train rows."""
    num_eval_other_answer: int
    """Held-out rows whose question has a different answer, or label, in anyone's train rows."""


@dataclass(frozen=True)
class _Key:
    """A row as digests, because a second copy of all texts would take too much memory."""

    question: bytes
    row: bytes


_Taught = dict[bytes, dict[bytes, set[str]]]
"""Question -> row -> who trains on it."""


def find_duplicates(
    rows: Mapping[str, ClientRows], server: Sequence[TaskRow] = ()
) -> dict[str, Duplicates]:
    """Count equal rows within each client, between clients, and across train and held-out parts.

    Args:
        rows: Rows of all clients whose rows this machine may read.
        server: The server's own train rows.
    """
    train = {name: [_key(row) for row in own.train] for name, own in rows.items()}
    taught: _Taught = {}
    for name, keys in {**train, SERVER: [_key(row) for row in server]}.items():
        for key in keys:
            taught.setdefault(key.question, {}).setdefault(key.row, set()).add(name)
    return {
        name: _count(name, train[name], [_key(row) for row in own.evaluation], taught)
        for name, own in rows.items()
    }


def which_are_among(rows: Sequence[TaskRow], others: Sequence[TaskRow]) -> list[int]:
    """The places of the rows that equal any of the others, in order."""
    known = {_key(row).row for row in others} if rows else set[bytes]()
    return [n for n, row in enumerate(rows) if _key(row).row in known]


def _count(
    name: str, train: Sequence[_Key], held_out: Sequence[_Key], taught: _Taught
) -> Duplicates:
    leaks = [taught.get(key.question, {}).get(key.row, set()) for key in held_out]
    return Duplicates(
        num_repeated=len(train) - len(set(train)),
        num_elsewhere=sum(len(taught[key.question][key.row]) > 1 for key in train),
        num_leaked_own=sum(name in who for who in leaks),
        num_leaked=sum(bool(who) for who in leaks),
        num_other_answer=_count_other_answers(train, taught),
        num_eval_other_answer=_count_other_answers(held_out, taught),
    )


def _count_other_answers(keys: Sequence[_Key], taught: _Taught) -> int:
    answers = ((key.row, taught.get(key.question, {})) for key in keys)
    # by counting: one question may have as many answers as there are rows
    return sum(len(known) > (row in known) for row, known in answers)


def _key(row: TaskRow) -> _Key:
    if is_pair(row):
        prompt, *said = ([_turn(one) for one in row[part]] for part in ("prompt", *ANSWERS))
        return _Key(_digest(prompt), _digest([prompt, *said]))
    if isinstance(row, dict):
        texts = cast(LabelledText, row)
        question = [texts["text"], texts.get("text_pair")]
        return _Key(_digest(question), _digest([*question, texts["label"]]))
    turns = [_turn(one) for one in row]
    return _Key(_digest([turn for turn in turns if turn[0] != "assistant"]), _digest(turns))


def _turn(turn: Message) -> tuple[object, ...]:
    return (turn["role"], turn["content"], *_more(turn))


def _more(turn: Message) -> list[object]:
    """What sets turns of the same text apart: tools, calls, and being only read."""
    tools = [turn[key] for key in ("tools", "tool_calls") if key in turn]
    return tools if turn.get("train", True) else [*tools, "context"]


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()
