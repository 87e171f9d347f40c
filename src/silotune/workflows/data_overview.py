"""Describe the clients' data before any training: rows, lengths and labels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from silotune.data.client_rows import ClientRows
from silotune.training.tasks.base import Task

QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def describe_split(rows: Mapping[str, ClientRows], tokenizer: Any, task: Task) -> dict[str, Any]:
    """Per client: numbers of rows, quantiles of the train rows' tokens, counts of labels.

    The numbers are num_train, num_eval, and num_validation if there are such rows.

    Args:
        rows: All clients' rows, as far as this machine may read them.
        tokenizer: The base's tokenizer, with its chat template.
        task: The recipe's task.
    """
    return {
        name: {
            "num_train": len(own.train),
            **({"num_validation": len(own.validation)} if own.validation else {}),
            "num_eval": len(own.evaluation),
            "tokens": quantiles(task.num_tokens(own.train, tokenizer)),
            "labels": dict(Counter(own.labels).most_common()),
        }
        for name, own in sorted(rows.items())
    }


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
