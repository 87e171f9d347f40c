"""Continued pre-training on plain texts: every token is learned, from the second to the end token.

The tokenizer puts its special tokens around a text as it does for any other. If it writes no end
token, one is appended, so that the model learns where a text ends, as TRL does for rows with a
text. A text longer than the limit is truncated: one row stays one example, whose influence
[privacy] bounds.
"""

from collections.abc import Sequence
from typing import Any

import torch

from silotune.data.conversations import Conversation
from silotune.training.tasks.base import Example, Prepared, Task, Written
from silotune.training.tasks.instruct import (
    collate,
    loss,
    loss_of,
    pack,
    predicted_logits,
)


def prepare(rows: Sequence[Conversation], tokenizer: Any, max_length: int) -> Prepared:
    """Tokenise texts. Nothing predicts the first token; all others are learned.

    Args:
        rows: Texts, each as the only turn of its row.
        tokenizer: A fast tokenizer with an end token.
        max_length: Maximum length of a row in tokens; longer rows are truncated at the end.
    """
    examples, kept, num_cut = [], [], 0
    for n, one in enumerate(written(rows, tokenizer)):
        ids = torch.tensor(one.ids[:max_length])
        num_cut += len(one.ids) > max_length
        if ids.numel() > 1:
            examples.append(Example(ids, torch.arange(ids.numel()) > 0))
            kept.append(n)
    return Prepared(tuple(examples), num_cut, len(rows) - len(kept), tuple(kept))


def written(rows: Sequence[Conversation], tokenizer: Any) -> list[Written]:
    """Every row with its end token, all of which is learned."""
    if not rows:
        return []
    eos = tokenizer.eos_token
    appended = "" if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id else eos
    texts = [turn["content"].removesuffix(eos) + appended for (turn,) in rows]
    found = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    return [
        Written(text, [(0, len(text))], ids, [start for start, _ in offsets])
        for text, ids, offsets in zip(
            texts, found["input_ids"], found["offset_mapping"], strict=True
        )
    ]


def num_tokens(rows: Sequence[Conversation], tokenizer: Any) -> list[int]:
    """Number of tokens of each text, including special tokens, before truncation."""
    return [len(one.ids) for one in written(rows, tokenizer)]


TEXT = Task(
    prepare=prepare,
    collate=collate,
    loss=loss,
    logits=predicted_logits,
    loss_of=loss_of,
    num_tokens=num_tokens,
    pack=pack,
    written=written,
)
