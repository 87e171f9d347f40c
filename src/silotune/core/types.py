"""The plain values that travel between the parts of a run. Frozen data, no behaviour, no I/O."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

AdapterState = Mapping[str, Tensor]
"""The trained tensors by name.

For LoRA: PEFT's saved names. For full fine-tuning: the model's own.
"""

Settings = Mapping[str, float]

LabelCounts = tuple[tuple[int, int, int], ...]
"""For each label: rows that have it and were given it, rows that were given it, rows that have it.

All that accuracy, F1 and Matthews correlation need, and it adds up over clients exactly.
"""


class Config(BaseModel):
    """Base of every part's configuration: frozen, no unknown keys, help text from docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class TensorSpec:
    """What the server expects of one tensor. A dimension of None accepts any size (mixed ranks)."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype


Layout = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class ServerState:
    """All that the server must remember between rounds.

    Saved whole, so that a run can stop anywhere.
    """

    round: int
    """Rounds that lie behind; 0 before the first."""
    adapter: AdapterState
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """An algorithm's own memory by purpose: optimizer moments, control variates, base patches."""


@dataclass(frozen=True)
class Broadcast:
    """What every client of a cohort receives."""

    round: int
    """The round that begins, counted from 1.

    In an evaluate message: rounds behind the adapter, plus 1.
    """
    adapter: AdapterState
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    score: bool = True
    """Whether clients score the received adapter on their held-out rows before they train."""


@dataclass(frozen=True)
class Score:
    """How well an adapter predicts one client's held-out rows.

    Sums, so that scores add up exactly.
    """

    client: str
    loss_sum: float
    """Negative log-likelihood in nats, summed over what is predicted."""
    num_tokens: int
    """What is predicted: the answers' tokens, or with the task classify one label a row."""
    num_correct: int
    """Of these, how many were predicted as most likely."""
    num_examples: int
    size_bytes: int = 0
    """Bytes sent down for this score alone; 0 when it came with a training message."""
    label_counts: LabelCounts = ()
    """With the task classify, for each label; else empty."""


@dataclass(frozen=True)
class Update:
    """One client's answer to a training message."""

    client: str
    round: int
    delta: AdapterState
    """After minus before, float32."""
    num_examples: int
    """Rows of the client's train part: its weight under `weights = "examples"`."""
    metrics: Mapping[str, float]
    """train_loss, num_tokens, num_padded_tokens, num_steps, seconds, lr, ..."""
    settings: Settings = field(default_factory=dict[str, float])
    """Constants of the local rule that the client really used, for instance {"mu": 0.01}."""
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """What an algorithm sends beside the delta, for instance changes of control variates."""
    score: Score | None = None
    """The received adapter on the client's held-out rows, before training."""
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class Change:
    """What many updates became: what the server applies."""

    delta: AdapterState
    """Moves the adapter, or is stacked beside it. Guards and noise act on this."""
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """What the algorithm's own memory needs, for instance the sum of control variates. It comes
    from the clients too, so a guard has to cover it or refuse the algorithm."""


@dataclass(frozen=True)
class Failure:
    """A client that delivered nothing usable.

    A code and a place; never exception text, it may hold data.
    """

    client: str
    round: int
    code: str
    place: str
    mend: str = ""


BUDGET_SPENT = "privacy budget spent"
"""The code of a failure of a client that has no privacy left to give."""

Arrival = Update | Failure


class Updates(Protocol):
    """The accepted updates of a round, in client-name order.

    May be walked several times; holds one at a time.
    """

    def __iter__(self) -> Iterator[Update]: ...
    def __len__(self) -> int: ...


class Clients(Protocol):
    """What a runtime fulfils: the data holders, wherever they are."""

    def names(self) -> Sequence[str]:
        """All clients that can be asked, sorted."""
        ...

    def train(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterable[Arrival]:
        """Ask each client of the cohort to train; yield answers as they arrive, in any order."""
        ...

    def evaluate(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterable[Score | Failure]:
        """Ask clients only to score the adapter on their held-out rows."""
        ...
