"""What a task is: how rows become tensors, and what is minimised. It knows no client or round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from silotune.models import LoadedModel


@dataclass(frozen=True)
class Example:
    """One tokenised row."""

    ids: Tensor
    """Token ids, shape (length,), int64."""
    trained: Tensor
    """Which tokens the loss is taken on, shape (length,), bool; never the first token."""


@dataclass(frozen=True)
class Batch:
    """Examples of similar length, padded on the right."""

    ids: Tensor
    """(batch, length), int64."""
    positions: Tensor
    """Indices into the flattened (batch * length) positions that predict a trained token,
    (num_trained,)."""
    targets: Tensor
    """The tokens to be predicted there, (num_trained,)."""
    num_real_tokens: int
    """Tokens without padding."""

    @property
    def num_trained(self) -> int:
        """Tokens that the loss is taken on."""
        return self.targets.numel()


@dataclass(frozen=True)
class Loss:
    """Sums over a batch's trained tokens."""

    loss_sum: Tensor
    """Negative log-likelihood in nats; a scalar with a graph while training."""
    logits: Tensor
    """(num_trained, vocabulary), detached."""


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


@dataclass(frozen=True)
class Task:
    """What is learned, as three functions."""

    prepare: Callable[[Sequence[Any], Any, int], Prepared]
    """(rows, tokenizer, max_length) -> examples."""
    collate: Callable[[Sequence[Example]], Batch]
    """Examples -> one padded batch."""
    loss: Callable[[LoadedModel, Batch], Loss]
    """(model, batch) -> sums over its trained tokens."""
