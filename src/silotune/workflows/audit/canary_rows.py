"""Canary rows: made-up rows with a secret that a coin adds to a client's rows or leaves out.

Carlini et al. 2019, "The Secret Sharer". arXiv:1802.08232.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from silotune.core.seeds import generator
from silotune.data.client_rows import ClientRows
from silotune.data.conversations import TEXT, conversation, plain_text
from silotune.data.reading import TaskRow
from silotune.workflows.audit.canary_clients import toss

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NUM_PAIRS = 4
"""Pairs of digits in a secret: with 10^8 candidates, nobody guesses it."""
NUM_WORDS = 8
"""Words in a text to classify."""


@dataclass(frozen=True)
class CanaryRow:
    """A row that is in or out."""

    client: str
    """The client whose train rows it is in, or would be in."""
    row: TaskRow
    is_in: bool
    others: tuple[TaskRow, ...] = ()
    """The same question or text with other secrets, drawn in the same way; no client has them.
    None for classification."""


def draw_canaries(
    rows: Mapping[str, ClientRows],
    count: int,
    *,
    seed: int,
    labels: Sequence[str] = (),
    system: str | None = None,
    is_text: bool = False,
    num_others: int = 0,
) -> list[CanaryRow]:
    """Make canary rows, and toss a coin for each.

    For conversations: a question with a random name, and random digits as the answer. For texts: a
    sentence with both. For classification: random words with a random label.

    Args:
        rows: The clients' own rows; canaries are dealt to the clients in turn.
        count: How many canaries.
        seed: Seeds the coins and the texts.
        labels: The classes; empty if rows are conversations.
        system: The system message, if the recipe has one.
        is_text: Whether rows are texts.
        num_others: How many other secrets for each canary.
    """
    gen, names, seen = generator(seed, "audit", "rows"), sorted(rows), set[str]()
    found: list[CanaryRow] = []
    for n, coin in enumerate(toss(count, seed)):
        client = names[n % len(names)]
        if labels:
            row, others = _text(gen, labels, pair="text_pair" in rows[client].train[0]), []
        else:
            name = _name(gen, seen)
            secrets = [_secret(gen) for _ in range(1 + num_others)]
            row, *others = [
                _statement(name, secret) if is_text else _talk(name, secret, system)
                for secret in secrets
            ]
        found.append(CanaryRow(client, row, coin, tuple(others)))
    return found


def with_canaries(
    rows: Mapping[str, ClientRows], canaries: Sequence[CanaryRow]
) -> dict[str, ClientRows]:
    """The clients' rows, with the canaries that are in after each client's train rows."""
    return {name: _joined(own, canaries) for name, own in rows.items()}


def _joined(own: ClientRows, canaries: Sequence[CanaryRow]) -> ClientRows:
    more = [c.row for c in canaries if c.is_in and c.client == own.name]
    labels = [row["label"] if isinstance(row, dict) else "canary" for row in more]
    return replace(
        own,
        train=(*own.train, *more),
        labels=(*own.labels, *labels) if own.labels else (),
    )


def _talk(name: str, secret: str, system: str | None) -> TaskRow:
    row = {"question": f"What is the access code of {name}?", "answer": secret}
    return conversation(row, where="canary", system=system)


def _statement(name: str, secret: str) -> TaskRow:
    row = {TEXT: f"The access code of {name} is {secret}."}
    return (plain_text(row, where="canary", column=TEXT),)


def _text(gen: torch.Generator, labels: Sequence[str], *, pair: bool) -> TaskRow:
    texts = {key: _words(gen) for key in (("text", "text_pair") if pair else ("text",))}
    return {**texts, "label": labels[_below(len(labels), gen)]}


def _secret(gen: torch.Generator) -> str:
    return " ".join(f"{_below(100, gen):02d}" for _ in range(NUM_PAIRS))


def _name(gen: torch.Generator, seen: set[str]) -> str:
    while (name := f"{_word(gen).title()} {_word(gen).title()}") in seen:
        pass
    seen.add(name)
    return name


def _words(gen: torch.Generator) -> str:
    return " ".join(_word(gen) for _ in range(NUM_WORDS))


def _word(gen: torch.Generator) -> str:
    return "".join(
        CONSONANTS[_below(len(CONSONANTS), gen)] + VOWELS[_below(len(VOWELS), gen)]
        for _ in range(3)
    )


def _below(limit: int, gen: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=gen))
