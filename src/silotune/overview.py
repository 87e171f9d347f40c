"""What the clients hold: rows, lengths and labels, before anything is trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from silotune.data import ClientRows
from silotune.rows import Conversation
from silotune.tasks.instruct import render

QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def describe_split(rows: Mapping[str, ClientRows], tokenizer: Any) -> dict[str, Any]:
    """Per client: num_train, num_eval, quantiles of the train rows' tokens, counts of labels.

    Args:
        rows: Of all clients, as far as this machine may read them.
        tokenizer: Of the base, with its chat template.
    """
    return {
        name: {
            "num_train": len(own.train),
            "num_eval": len(own.evaluation),
            "tokens": _quantiles(num_tokens(own.train, tokenizer)),
            "labels": dict(Counter(own.labels).most_common()),
        }
        for name, own in sorted(rows.items())
    }


def num_tokens(talks: Sequence[Conversation], tokenizer: Any) -> list[int]:
    """Tokens of each conversation, with its template, before anything is cut."""
    texts = [render(tokenizer, talk, ask=False) for talk in talks]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    return {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()}
