"""Classification of a text, or of a pair of texts, with any encoder or decoder.

One label per row: the loss is a mean over rows, whatever their length. The model is transformers'
sequence classification model of the family: an encoder reads its first token, a decoder its last.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from silotune.core.errors import ModelError
from silotune.data.labelled_texts import LabelledText
from silotune.models.loading import LoadedModel
from silotune.training.tasks.base import Batch, Example, Loss, Prepared, Task


def classify(labels: Sequence[str]) -> Task:
    """Build the task.

    Args:
        labels: All classes, in the order of the model's outputs.
    """
    index = {label: n for n, label in enumerate(labels)}

    def prepare(rows: Sequence[LabelledText], tokenizer: Any, max_length: int) -> Prepared:
        return _prepare(rows, tokenizer, max_length, index)

    return Task(
        prepare=prepare,
        collate=collate,
        loss=loss,
        num_tokens=num_tokens,
        labels=tuple(labels),
    )


def _encode(rows: Sequence[LabelledText], tokenizer: Any, **options: Any) -> Any:
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows if "text_pair" in row] or None
    return tokenizer(texts, pairs, **options)


def num_tokens(rows: Sequence[LabelledText], tokenizer: Any) -> list[int]:
    """Number of tokens of each row, including special tokens, before truncation."""
    return [len(ids) for ids in _encode(rows, tokenizer, verbose=False)["input_ids"]]


def _prepare(
    rows: Sequence[LabelledText], tokenizer: Any, max_length: int, index: dict[str, int]
) -> Prepared:
    if not rows:
        return Prepared((), 0, 0)
    num_cut = sum(length > max_length for length in num_tokens(rows, tokenizer))
    examples = _examples(rows, tokenizer, max_length, [index[row["label"]] for row in rows])
    return Prepared(tuple(examples), num_cut, 0, tuple(range(len(rows))))


def _examples(
    rows: Sequence[LabelledText], tokenizer: Any, max_length: int, labels: Sequence[int]
) -> list[Example]:
    # the tokenizer truncates, not us: what it puts at the end of a text has to stay there
    encoded = _encode(rows, tokenizer, truncation=True, max_length=max_length)
    segments = encoded.get("token_type_ids") if "text_pair" in rows[0] else None
    return [
        Example(
            torch.tensor(ids),
            torch.zeros(len(ids), dtype=torch.bool),
            label=labels[n],
            segments=None if segments is None else torch.tensor(segments[n]),
        )
        for n, ids in enumerate(encoded["input_ids"])
    ]


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest example. `positions` is the first position of every row."""
    length = max(e.ids.numel() for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    mask = torch.zeros(len(examples), length, dtype=torch.bool)
    segments = None if examples[0].segments is None else torch.zeros_like(ids)
    for i, example in enumerate(examples):
        ids[i, : example.ids.numel()] = example.ids
        mask[i, : example.ids.numel()] = True
        if segments is not None and example.segments is not None:
            segments[i, : example.ids.numel()] = example.segments
    return Batch(
        ids=ids,
        positions=torch.arange(len(examples)) * length,
        targets=torch.tensor([e.label for e in examples]),
        num_real_tokens=int(mask.sum()),
        mask=mask,
        segments=segments,
    )


def loss(loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
    """Negative log-likelihood of the rows' labels."""
    device, mask = loaded.device, batch.mask
    # a decoder finds a row's last token by the padding id, so the padding must be exactly that id
    ids = batch.ids.masked_fill(~mask, padding_id(loaded.tokenizer))
    given: dict[str, Tensor] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if batch.segments is not None:
        given["token_type_ids"] = batch.segments.to(device)
    out = loaded.model(**given, output_attentions=attentions)
    logits = out.logits.float()  # (batch, labels)
    nll = F.cross_entropy(logits, batch.targets.to(device), reduction="sum")
    return Loss(nll, logits, tuple(out.attentions) if attentions else ())


def padding_id(tokenizer: Any) -> int:
    """The id that fills a batch: the tokenizer's padding token, or else its end token.

    Raises:
        ModelError: It has neither.
    """
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found
    raise ModelError(
        "the tokenizer has neither a padding nor an end token, so rows cannot share a batch.\n"
        "  Use a model whose tokenizer defines pad_token."
    )


def predictions(loaded: LoadedModel, rows: Sequence[LabelledText], max_length: int) -> Tensor:
    """Probabilities of the labels for some texts, (rows, labels), float32 on the CPU.

    Args:
        loaded: In evaluation mode.
        rows: Labelled texts; their labels are ignored.
        max_length: Maximum length of a text, in tokens.
    """
    examples = _examples(rows, loaded.tokenizer, max_length, [0] * len(rows))
    with torch.inference_mode():
        return loss(loaded, collate(examples)).logits.softmax(-1).cpu()
