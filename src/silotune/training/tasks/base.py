"""What a task is: how rows become tensors, and what is minimised. It knows no client or round."""

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
    """Which tokens the loss is taken on, shape (length,), bool; never the first token."""
    label: int = -1
    """With the task classify, the class of the row: the number of a label."""
    segments: Tensor | None = None
    """Which text of a pair a token belongs to, (length,), for families that want to be told."""


@dataclass(frozen=True)
class Batch:
    """Examples of similar length, padded on the right."""

    ids: Tensor
    """(batch, length), int64."""
    positions: Tensor
    """Indices into the flattened (batch * length) positions that predict a target, (num_trained,).
    """
    targets: Tensor
    """What is to be predicted there, (num_trained,): tokens, or one label a row."""
    num_real_tokens: int
    """Tokens without padding."""
    mask: Tensor
    """Which positions are not padding, (batch, length), bool."""
    segments: Tensor | None = None
    """As in the examples, (batch, length)."""
    owners: Tensor | None = None
    """Of packed examples: the example that each position belongs to, (length,); the batch is 1."""

    @property
    def num_trained(self) -> int:
        """Predictions that the loss is taken on."""
        return self.targets.numel()


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's targets."""

    loss_sum: Tensor
    """Negative log-likelihood in nats; a scalar with a graph while training."""
    logits: Tensor
    """(num_trained, vocabulary or labels), with a graph while training."""
    attentions: tuple[Tensor, ...] = ()
    """When asked for: of every layer, (batch, heads, length, length)."""


def row_losses(loss: Loss, batch: Batch) -> Tensor:
    """The mean loss of every row over its own targets, (batch,), with a graph.

    A mean over the targets of all rows together would let one row's length change another's part.
    """
    targets = batch.targets.to(loss.logits.device)
    each = F.cross_entropy(loss.logits, targets, reduction="none")  # (num_trained,)
    rows = (batch.positions // batch.ids.shape[1]).to(each.device)
    zeros = each.new_zeros(batch.ids.shape[0])
    counts = zeros.index_add(0, rows, torch.ones_like(each))
    return zeros.index_add(0, rows, each) / counts.clamp(min=1)


@dataclass(frozen=True)
class Prepared:
    """A client's rows as examples, and what became of the others."""

    examples: tuple[Example, ...]
    num_cut: int
    """Rows longer than the limit: their end is missing."""
    num_dropped: int
    """Rows whose trained part lies beyond the limit altogether; not used."""
    rows: tuple[int, ...] = ()
    """Which row each example comes from."""


class LossOf(Protocol):
    """How a task scores a batch."""

    def __call__(self, loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
        """Sums over the batch's targets; `attentions` needs a model with eager attention."""
        ...


@dataclass(frozen=True)
class Task:
    """What is learned, as four functions."""

    prepare: Callable[[Sequence[Any], Any, int], Prepared]
    """(rows, tokenizer, max_length) -> examples."""
    collate: Callable[[Sequence[Example]], Batch]
    """Examples -> one padded batch."""
    loss: LossOf
    num_tokens: Callable[[Sequence[Any], Any], list[int]]
    """(rows, tokenizer) -> tokens of each row before anything is cut."""
    pack: Callable[[Sequence[Example]], Batch] | None = None
    """Examples -> one batch without padding, where the task can."""
    labels: tuple[str, ...] = ()
    """The classes, when a row is to be given one of them; empty when it is to be answered."""
