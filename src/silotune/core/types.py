"""The plain values that travel between the parts of a run. Frozen data, no behaviour, no I/O."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AdapterState = Mapping[str, "Tensor"]
"""The trained tensors by name.

For LoRA: PEFT's saved names. For full fine-tuning: the model's own.
"""

Settings = Mapping[str, float]

LabelCounts = tuple[tuple[int, int, int], ...]
"""For each label: rows that have it and were given it, rows that were given it, rows that have it.

Accuracy, F1 and Matthews correlation need nothing else, and it adds up exactly over clients.
"""


SCALARS = (bool, int, float, str)


def _scalars(annotation: Any) -> set[Any]:
    """The scalar types that an annotation mentions at any depth; Any for what it leaves open."""
    if get_origin(annotation) is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if inner := get_args(annotation):
        return set[Any]().union(*(_scalars(part) for part in inner))
    if annotation in SCALARS:
        return {annotation}
    if annotation in (None, type(None), Ellipsis):
        return set()
    return {Any}  # a section checks its own fields


def _check_scalars(given: Any, wanted: set[Any]) -> None:
    """Raise a ValueError for a scalar that only a conversion would fit to the wanted types."""
    if isinstance(given, Mapping):
        given = list(cast(Mapping[Any, Any], given).values())
    if isinstance(given, (list, tuple)):
        for item in cast(Sequence[Any], given):
            _check_scalars(item, wanted)
        return
    numbers = wanted & {int, float}
    if isinstance(given, bool) and numbers and bool not in wanted:
        raise ValueError(f"should be a number, got {given}")
    if isinstance(given, str) and str not in wanted and wanted:
        kind = "a number" if numbers else "true or false"
        raise ValueError(f"should be {kind}, got {given!r:.60}")
    if isinstance(given, (int, float)) and wanted == {bool} and not isinstance(given, bool):
        raise ValueError(f"should be true or false, got {given}")


class Config(BaseModel):
    """Base of every part's configuration: frozen, no unknown keys, help text from docstrings.

    A value has the type that its field says: true is no number, and "1" is none either. Where a
    limit is meant, pydantic's conversions would turn a slip into a wrong limit.

    Every number is finite, and no integer is beyond `LARGEST`, unless a field has a narrower range.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_conversion(cls, given: Any, info: ValidationInfo) -> Any:
        wanted = _scalars(cls.model_fields[str(info.field_name)].annotation)
        if Any not in wanted:
            _check_scalars(given, wanted)
        return given

    @field_validator("*", mode="after")
    @classmethod
    def _keep_numbers_in_range(cls, value: Any) -> Any:
        for number in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError("should be a finite number")
            if abs(number) > LARGEST and isinstance(number, int):
                raise ValueError(f"should be between -{LARGEST} and {LARGEST}")
        return value


LARGEST = 2**53
"""Up to here, JSON and float64 hold every integer exactly; libraries take no larger ones."""


def _numbers(value: object) -> Iterator[int | float]:
    """The numbers in a value, also in lists and tables of options that no model describes."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        for inner in cast(Mapping[str, object], value).values():
            yield from _numbers(inner)
    elif isinstance(value, (list, tuple)):
        for inner in cast(Sequence[object], value):
            yield from _numbers(inner)


@dataclass(frozen=True)
class TensorSpec:
    """What the server expects of one tensor. A dimension of None accepts any size (mixed ranks)."""

    shape: tuple[int | None, ...]
    dtype: "torch.dtype"


Layout = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class News:
    """What is new in an adapter since an earlier round, as it travels."""

    base: int
    """Completed rounds of the adapter that it is added to."""
    names: tuple[str, ...]
    """The tensors that it is about; others are as they were."""
    payload: AdapterState
    """These tensors, or what a codec makes of their changes."""


@dataclass(frozen=True)
class ServerState:
    """Everything the server must remember between rounds.

    Saved completely, so that a run can stop at any point.
    """

    round: int
    """Completed rounds; 0 before the first."""
    adapter: AdapterState
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """An algorithm's memory by purpose: optimizer moments, control variates, base patches."""
    news: News | None = None
    """Of the last round, if there is a way to tell it. Not saved: after an interruption, clients
    receive the whole adapter."""


@dataclass(frozen=True)
class Broadcast:
    """What every client of a cohort receives."""

    round: int
    """The round that starts, counted from 1.

    In an evaluate message: the adapter's completed rounds, plus 1.
    """
    adapter: AdapterState
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    score: bool = True
    """Whether clients score the received adapter on their held-out rows before they train."""
    news: News | None = None
    """What has to be added to the adapter of an earlier round to get this one."""
    start: AdapterState = field(default_factory=dict[str, "Tensor"])
    """For a client that needs the adapter that the run started from and has not received it."""


@dataclass(frozen=True)
class Score:
    """How well an adapter predicts one client's held-out rows.

    Sums, so that scores add up exactly.
    """

    client: str
    loss_sum: float
    """Negative log-likelihood in nats, summed over the predictions."""
    num_tokens: int
    """Number of predictions: the answers' tokens, with the task classify one label per row, with
    the task prefer one per pair."""
    num_correct: int
    """How many of these the model ranked as most likely."""
    num_examples: int
    size_bytes: int = 0
    """Bytes sent down for this score alone; 0 when it came with a training message."""
    label_counts: LabelCounts = ()
    """With the task classify: one entry per label; otherwise empty."""
    metric: float | None = None
    """What evaluate.metric makes of the client's rows; None without one."""
    margin_sum: float | None = None
    """With the task prefer: the sum of the pairs' reward margins."""
    num_preferred: int | None = None
    """With the task prefer: the pairs whose reward margin is above 0."""


@dataclass(frozen=True)
class Update:
    """One client's answer to a training message."""

    client: str
    round: int
    delta: AdapterState
    """After minus before, float32; on its way to the server what the codec makes of it."""
    num_examples: int
    """Rows of the client's train part: its weight under `weights = "examples"`."""
    metrics: Mapping[str, float]
    """train_loss, num_tokens, num_padded_tokens, num_steps, seconds, lr, ..."""
    settings: Settings = field(default_factory=dict[str, float])
    """Constants of the local rule that the client actually used, for example {"mu": 0.01}."""
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """What an algorithm sends besides the delta, for example changes of control variates."""
    score: Score | None = None
    """The score of the received adapter on the client's held-out rows, before training."""
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class Change:
    """Many updates combined into one: what the server applies."""

    delta: AdapterState
    """Added to the adapter, or stacked next to it. Guards and noise act on this."""
    extra: Mapping[str, AdapterState] = field(default_factory=dict[str, AdapterState])
    """What the algorithm's memory needs, for example the sum of control variates. It comes from
    the clients too, so a guard has to cover it or refuse the algorithm."""


@dataclass(frozen=True)
class Failure:
    """A client that delivered nothing usable.

    A code and a place; never exception text, which may contain data.
    """

    client: str
    round: int
    code: str
    place: str
    fix: str = ""


BUDGET_SPENT = "privacy budget spent"
"""The failure code of a client whose privacy budget is spent."""
AWAITS_CONSENT = "waiting for consent"
"""The failure code of a client whose people have not agreed to the run yet; it may join later."""

Arrival = Update | Failure


class Updates(Protocol):
    """The accepted updates of a round, in client-name order.

    Can be iterated several times; keeps one update in memory at a time.
    """

    def __iter__(self) -> Iterator[Update]: ...
    def __len__(self) -> int: ...


class Clients(Protocol):
    """What a runtime implements: the data holders, wherever they are."""

    def names(self) -> Sequence[str]:
        """All clients that can be asked, sorted."""
        ...

    def num_rows(self) -> Mapping[str, Mapping[str, int]]:
        """num_train and num_eval of each client, as it first reported them.

        What it says later about its rows may not exceed this.
        """
        ...

    def train(self, messages: Mapping[str, Broadcast]) -> Iterable[Arrival]:
        """Ask clients to train, each with its own message; yield answers as they arrive.

        The order is free. A runtime is handed all clients of a round at once, so it may train
        several of them together.
        """
        ...

    def evaluate(self, messages: Mapping[str, Broadcast]) -> Iterable[Score | Failure]:
        """Ask clients only to score the adapter on their held-out rows."""
        ...
