"""What the clients hold: rows, lengths and labels, before anything is trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from silotune.data.clients import ClientRows
from silotune.training.tasks.base import Task

QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def describe_split(rows: Mapping[str, ClientRows], tokenizer: Any, task: Task) -> dict[str, Any]:
    """Per client: num_train, num_eval, quantiles of the train rows' tokens, counts of labels.

    Args:
        rows: Of all clients, as far as this machine may read them.
        tokenizer: Of the base, with its chat template.
        task: The recipe's.
    """
    return {
        name: {
            "num_train": len(own.train),
            "num_eval": len(own.evaluation),
            "tokens": quantiles(task.num_tokens(own.train, tokenizer)),
            "labels": dict(Counter(own.labels).most_common()),
        }
        for name, own in sorted(rows.items())
    }


def label_warnings(rows: Mapping[str, ClientRows], labels: Sequence[str]) -> list[str]:
    """What a classifier will find hard: clients that lack labels, and labels that all lack."""
    warnings: list[str] = []
    seen: set[str] = set()
    for name, own in sorted(rows.items()):
        has = set(own.labels)
        seen |= has
        lacks = [label for label in labels if label not in has]
        if len(has) == 1:
            warnings.append(f"client '{name}' has rows of one label only: '{own.labels[0]}'")
        elif lacks:
            warnings.append(f"client '{name}' has no train row of: {', '.join(lacks)}")
    if unseen := [label for label in labels if label not in seen]:
        warnings.append(f"no client has a train row of: {', '.join(unseen)}")
    return warnings


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """Of at least one length, by the names of `QUANTILES`."""
    return {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()}
