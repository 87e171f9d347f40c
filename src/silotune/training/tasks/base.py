"""What a task is: how rows become tensors, and what is minimised. Knows no clients or rounds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from silotune.models.loading import LoadedModel


@dataclass(frozen=True)
class Example:
    """One tokenised row."""

    ids: Tensor
    """Token ids, shape (length,), int64."""
    trained: Tensor
    """Which tokens the loss is computed on, shape (length,), bool; never the first token."""
    label: int = -1
    """With the task classify: the class of the row, as the index of a label."""
    segments: Tensor | None = None
    """Which text of a pair a token belongs to, (length,), for families that use it. With the task
    prefer, `ids` are two sequences one after the other: 0 marks the chosen one, 1 the rejected."""
    reference: Tensor | None = None
    """With the task prefer: the log-probabilities of both answers under the reference, (2,),
    float32. Absent until they are computed, see references.py."""

    @property
    def num_positions(self) -> int:
        """Positions of the row in a batch of itself, with the padding of its shorter sequence."""
        if self.label >= 0 or self.segments is None:
            return self.ids.numel()
        second = int(self.segments.sum())
        return 2 * max(second, self.ids.numel() - second)


@dataclass(frozen=True)
class Batch:
    """Examples of similar length, padded on the right."""

    ids: Tensor
    """(batch, length), int64. Of pairs, the sequences 2 n and 2 n + 1 belong to row n."""
    positions: Tensor
    """Indices into the flattened (batch * length) positions that predict a target, (num_trained,).
    """
    targets: Tensor
    """What to predict there, (num_trained,): tokens, or one label per row."""
    num_real_tokens: int
    """Tokens without padding."""
    mask: Tensor
    """Which positions are not padding, (batch, length), bool."""
    segments: Tensor | None = None
    """As in the examples, (batch, length)."""
    owners: Tensor | None = None
    """If packed: the example that each position belongs to, (length,); the batch is 1."""
    sequences: int = 1
    """Sequences of one row: 2 for pairs."""
    reference: Tensor | None = None
    """Of pairs, as in the examples, (rows, 2)."""

    @property
    def num_trained(self) -> int:
        """Number of predictions in the loss."""
        return self.targets.numel()

    @property
    def num_terms(self) -> int:
        """What the loss is a sum over: predictions, or pairs."""
        return self.num_trained if self.sequences == 1 else self.ids.shape[0] // self.sequences


@dataclass(frozen=True)
class PairScores:
    """How a model ranks the two answers of each row, (rows,) each."""

    losses: Tensor
    """With a graph while training."""
    margins: Tensor
    """Difference of the implicit rewards of the chosen and the rejected answer, without a graph:
    above 0, the model prefers the chosen one more than the reference does."""
    gaps: Tensor
    """Difference of their log-probabilities, without a graph: above 0, the chosen one is likelier.
    """


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's targets."""

    loss_sum: Tensor
    """Negative log-likelihood in nats; a scalar with a graph while training."""
    logits: Tensor
    """(num_trained, vocabulary or labels), in float32 with a graph while training, otherwise as the
    model wrote them."""
    attentions: tuple[Tensor, ...] = ()
    """If requested: one per layer, (batch, heads, length, length)."""
    pairs: PairScores | None = None
    """If rows are pairs. `loss_sum` is then the sum of their losses."""


PREDICTIONS_AT_ONCE = 64
"""Predictions whose logits are in float32 at a time: with 49,152 tokens, 12.6 MB."""


def each_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of every target in nats, (num_trained,), float32; no gradient.

    A copy of all logits in float32, and another one of their log-probabilities, would be larger
    than all that a forward pass keeps for a score, and slower to fill than a processor's cache.

    Args:
        logits: (num_trained, vocabulary or labels), in any precision.
        targets: (num_trained,), on the same device.
    """
    parts = zip(logits.split(PREDICTIONS_AT_ONCE), targets.split(PREDICTIONS_AT_ONCE), strict=True)
    # fp32: bf16 log-sums lose the small classes
    found = [F.cross_entropy(own.float(), wanted, reduction="none") for own, wanted in parts]
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)


def row_losses(loss: Loss, batch: Batch) -> Tensor:
    """The mean loss of every row over its own targets, (batch,), with a graph.

    A mean over the targets of all rows would let one row's length change another row's weight. A
    pair has one loss already.
    """
    if loss.pairs is not None:
        return loss.pairs.losses
    targets = batch.targets.to(loss.logits.device)
    each = F.cross_entropy(loss.logits, targets, reduction="none")  # (num_trained,)
    rows = (batch.positions // batch.ids.shape[1]).to(each.device)
    zeros = each.new_zeros(batch.ids.shape[0])
    counts = zeros.index_add(0, rows, torch.ones_like(each))
    return zeros.index_add(0, rows, each) / counts.clamp(min=1)


@dataclass(frozen=True)
class Prepared:
    """A client's rows as examples, and what happened to the others."""

    examples: tuple[Example, ...]
    num_cut: int
    """Rows longer than the limit, which were truncated."""
    num_dropped: int
    """Rows whose trained part is entirely beyond the limit; not used."""
    rows: tuple[int, ...] = ()
    """Index of the row that each example comes from."""


@dataclass(frozen=True)
class Written:
    """A row as text, what of it is learned, and its tokens."""

    text: str
    spans: Sequence[tuple[int, int]]
    """Learned parts: first character, and the one behind the last."""
    ids: list[int]
    starts: list[int]
    """The character at which each token starts."""


class LossOf(Protocol):
    """How a task scores a batch."""

    def __call__(self, loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
        """Sums over the batch's targets; `attentions` needs a model with eager attention."""
        ...


@dataclass(frozen=True)
class Task:
    """What is learned, as a few functions."""

    prepare: Callable[[Sequence[Any], Any, int], Prepared]
    """(rows, tokenizer, max_length) -> examples."""
    collate: Callable[[Sequence[Example]], Batch]
    """Examples -> one padded batch."""
    loss: LossOf
    num_tokens: Callable[[Sequence[Any], Any], list[int]]
    """(rows, tokenizer) -> number of tokens of each row, before truncation."""
    pack: Callable[[Sequence[Example]], Batch] | None = None
    """Examples -> one batch without padding, if the task supports it."""
    written: Callable[[Sequence[Any], Any], list[Written]] | None = None
    """(rows, tokenizer) -> the rows as text; None if a row is not one text."""
    is_asked: bool = False
    """Whether a row has a question that a model can be asked."""
    labels: tuple[str, ...] = ()
    """The classes, if rows are classified; otherwise empty."""
    logits: Callable[[LoadedModel, Batch], Tensor] | None = None
    """(model, batch) -> what `Loss.logits` holds, if rows of several clients can share a batch."""
    loss_of: Callable[[Tensor, Batch], Loss] | None = None
    """(logits of a batch, batch) -> its loss: with `logits`, the two halves of `loss`."""
    reference: Callable[[LoadedModel, Batch], Tensor] | None = None
    """(model, batch) -> what `Example.reference` holds for each row, (rows, 2), if rows are pairs.
    """
