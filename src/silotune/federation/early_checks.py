"""Find, before the first round, what tokenizing all rows would find, on as few rows as possible.

Clients are tokenized when they are asked, and a run must not end in its last round because of a row
that could have been seen in its first second. A chat template refuses a conversation for its turns,
not for its words, so one row of each kind is enough. Whether any row fits is decided by the one
with the shortest prompt. What only a certain text can cause stays for the moment at which its
client is asked: it is then this client's failure, and the run goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from silotune.core.errors import DataError
from silotune.data.client_rows import ClientRows
from silotune.data.conversations import Message
from silotune.data.preferences import talks_of
from silotune.data.reading import TaskRow
from silotune.federation.client_data import ClientData, Worker


def check_before_rounds(
    rows: Mapping[str, ClientRows], data: Mapping[str, ClientData], worker: Worker
) -> None:
    """Tokenize one row of each kind and the shortest row of each part.

    A part in which one of them cannot be used is tokenized as a whole, for the same error as if
    every part were.

    Args:
        rows: All clients' rows.
        data: The same clients, not tokenized yet.
        worker: The process's model.

    Raises:
        DataError: A row cannot be used, or no row of a part. The message names it.
    """
    if worker.task.labels:  # no template, and a long text is read up to its limit
        return
    beyond, seen = _tokens_without_embedding(worker), set[object]()
    chosen: list[tuple[str, str, TaskRow]] = []
    for name, part, own in _parts(rows):
        new = [row for row in own if (kind := kind_of(row)) not in seen and not seen.add(kind)]
        holding = [row for row in own if beyond and _holds(row, beyond)]
        shortest = min(own, key=_prompt_length, default=None)
        few = [*new, *holding, *([] if shortest is None else [shortest])]
        chosen += [(name, part, row) for row in few]
        if holding or shortest is None:
            getattr(data[name], part)  # raises what is wrong
    usable = _usable([row for _, _, row in chosen], worker)
    for (name, part, _), is_usable in zip(chosen, usable, strict=True):
        if not is_usable:
            getattr(data[name], part)


def kind_of(row: TaskRow) -> object:
    """What a chat template may refuse a row for: its turns, and what each has."""
    return tuple(tuple(_kind_of_turn(turn) for turn in talk) for talk in talks_of(row))


def _kind_of_turn(turn: Message) -> tuple[object, ...]:
    text = turn["content"]
    marks = (bool(text.strip()), "<think>" in text, "</think>" in text)
    return (turn["role"], turn.get("train", True), *marks, *sorted(turn))


def _prompt_length(row: TaskRow) -> int:
    """Characters in front of the first answer; of a pair, in the longer of its conversations."""
    lengths: list[int] = []
    for talk in talks_of(row):
        answers = [n for n, turn in enumerate(talk) if turn["role"] == "assistant"]
        before = talk[: answers[0]] if answers else talk
        lengths.append(sum(len(turn["content"]) for turn in before))
    return max(lengths)


def _parts(rows: Mapping[str, ClientRows]) -> Iterator[tuple[str, str, Sequence[TaskRow]]]:
    """Every part of every client: its name, which part, and the rows."""
    for name in sorted(rows):
        yield name, "train", rows[name].train
        yield name, "scored", rows[name].scored


def _usable(rows: Sequence[TaskRow], worker: Worker) -> list[bool]:
    """Whether each row has something to learn within the limit, and is not refused."""
    tokenizer, limit = worker.loaded.tokenizer, worker.run.train.max_length
    try:
        kept = set(worker.task.prepare(rows, tokenizer, limit).rows)
        return [n in kept for n in range(len(rows))]
    except DataError:
        if len(rows) == 1:
            return [False]
    return [fits for row in rows for fits in _usable([row], worker)]


def _tokens_without_embedding(worker: Worker) -> list[str]:
    """The tokenizer's tokens that a text may hold and the model does not know."""
    num_rows = worker.loaded.model.get_input_embeddings().weight.shape[0]
    known: dict[str, int] = worker.loaded.tokenizer.get_vocab()
    return [token for token, number in known.items() if number >= num_rows]


def _holds(row: Any, tokens: Sequence[str]) -> bool:
    texts = [turn["content"] for talk in talks_of(row) for turn in talk]
    return any(token in text for token in tokens for text in texts)
