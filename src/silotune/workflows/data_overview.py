"""Describe the clients' data before any training: rows, lengths and labels."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from silotune.core.errors import DataError
from silotune.data.client_rows import ClientRows
from silotune.data.reading import TaskRow
from silotune.data.row_draws import evenly
from silotune.data.template_limits import TemplateLimitError
from silotune.training.tasks.base import Task

QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}

REFUSED = (DataError, TemplateLimitError)

MEASURED, FEWEST = 5_000, 5
"""Train rows whose lengths a finished run describes, of all clients together, and of each."""


def describe_split(
    rows: Mapping[str, ClientRows], tokenizer: Any, task: Task, *, at_most: int | None = None
) -> dict[str, Any]:
    """Per client: numbers of rows, quantiles of the train rows' tokens, counts of labels.

    The numbers are num_train, num_eval, and num_validation if there are such rows; num_measured if
    the quantiles are those of this many train rows only.

    Args:
        rows: All clients' rows, as far as this machine may read them.
        tokenizer: The base's tokenizer, with its chat template.
        task: The recipe's task.
        at_most: How many train rows of all clients together are tokenized: the same share of each
            client's, evenly spaced, and at least `FEWEST`.
    """
    total = sum(len(own.train) for own in rows.values())
    share = 1.0 if at_most is None else min(1.0, at_most / max(1, total))
    return {
        name: {
            "num_train": len(own.train),
            **({"num_validation": len(own.validation)} if own.validation else {}),
            "num_eval": len(own.evaluation),
            **_lengths(own.train, tokenizer, task, share),
            "labels": dict(Counter(own.labels).most_common()),
        }
        for name, own in sorted(rows.items())
    }


def _lengths(rows: Sequence[TaskRow], tokenizer: Any, task: Task, share: float) -> dict[str, Any]:
    """The quantiles, and of how many rows they are, if not of all."""
    some = evenly(rows, None if share == 1 else max(FEWEST, round(share * len(rows))))
    try:
        lengths = task.num_tokens(some, tokenizer)
    except REFUSED:  # a row of a client that was never asked: no reason to lose the results
        lengths = list(_each_length(some, tokenizer, task))
    measured = {} if len(lengths) == len(rows) else {"num_measured": len(lengths)}
    return {**measured, "tokens": quantiles(lengths) if lengths else {}}


def _each_length(rows: Sequence[TaskRow], tokenizer: Any, task: Task) -> Iterator[int]:
    for row in rows:
        with contextlib.suppress(*REFUSED):
            yield from task.num_tokens([row], tokenizer)


def label_warnings(rows: Mapping[str, ClientRows], labels: Sequence[str]) -> list[str]:
    """What makes classification hard: clients that lack labels, and labels that no client has."""
    warnings: list[str] = []
    seen: set[str] = set()
    for name, own in sorted(rows.items()):
        present = set(own.labels)
        seen |= present
        missing = [label for label in labels if label not in present]
        if len(present) == 1:
            warnings.append(
                f"all train rows of client '{name}' have the same label: '{own.labels[0]}'"
            )
        elif missing:
            warnings.append(f"client '{name}' has no train rows labelled: {', '.join(missing)}")
    if unseen := [label for label in labels if label not in seen]:
        warnings.append(f"no client has train rows labelled: {', '.join(unseen)}")
    return warnings


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """The quantiles of at least one length, by the names of `QUANTILES`."""
    return {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()}
