"""Converts our types to parcels and back, and counts the bytes on the wire.

The form of what arrives is checked here; what it means is checked in `federation/acceptance.py`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from torch import Tensor

from silotune.core.errors import UpdateError
from silotune.core.types import AdapterState, Broadcast, Failure, News, Score, Update
from silotune.runtime.payload import Parcel, no_values

Groups = Mapping[str, AdapterState]
AnyForm = TypeVar("AnyForm", bound=BaseModel)
Count = Annotated[int, Field(ge=0, le=2**53)]
"""Integers that a float holds exactly: a larger one could not be a weight."""


MAX_LABELS = 10_000
"""More classes than any text data set has."""
MAX_LOSS = 1e6
"""Most nats per prediction. A guess among a million classes costs 14, a confident wrong one some
hundreds."""
Seconds = Annotated[FiniteFloat, Field(ge=0, le=10 * 365.25 * 86400)]
"""At most ten years."""
Name = Annotated[str, Field(max_length=1000)]
Word = Annotated[str, Field(max_length=100)]
Shape = Annotated[list[int], Field(max_length=64)]
"""torch sums tensors of at most 64 dimensions."""
Listed = tuple[str, str, list[int]] | tuple[str, str, list[int], str]


class Form(BaseModel):
    """The form of a message: other keys are refused."""

    model_config = ConfigDict(extra="forbid")


class _Tensors(Form):
    tensors: list[tuple[Name, Name, Shape] | tuple[Name, Name, Shape, Word]]
    """Group, name and shape of every tensor, in the order of the values, and its type unless that
    is float32."""


class _Broadcast(_Tensors):
    round: int = Field(ge=1, le=2**53)
    score: bool
    base: Count | None = None
    """Of news: the completed rounds of the adapter that they are added to."""
    changed: Annotated[list[Name], Field(max_length=1_000_000)] = []
    """Of news: the tensors that they are about."""


class _Score(Form):
    loss_sum: float
    num_tokens: Annotated[int, Field(ge=1, le=2**53)]
    num_correct: Count
    num_examples: Count
    label_counts: Annotated[list[tuple[Count, Count, Count]], Field(max_length=MAX_LABELS)] = []
    metric: FiniteFloat | None = None
    margin_sum: FiniteFloat | None = None
    num_preferred: Count | None = None


class _Metrics(Form):
    """What every update says about its training. Other keys could overwrite those of a row.

    Under [privacy], real clients leave out what depends on their rows; see `client.withheld`.
    """

    train_loss: Annotated[FiniteFloat, Field(ge=0, le=MAX_LOSS)] | None = None
    penalty: Annotated[FiniteFloat, Field(ge=-1e12, le=1e12)] | None = None
    lr: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    num_steps: Count = 0
    num_tokens: Count | None = None
    num_targets: Count | None = None
    num_padded_tokens: Count | None = None
    seconds_training: Seconds | None = None
    seconds: Seconds | None = None
    numbers_cut: Count | None = None
    noise_multiplier: Annotated[FiniteFloat, Field(ge=0, le=1e6)] | None = None
    sampling_rate: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    num_lots: Annotated[int, Field(ge=0, le=10**9)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "_Metrics":
        together = (self.train_loss, self.num_tokens, self.seconds, self.seconds_training)
        if len({value is None for value in together}) > 1:
            raise ValueError("train_loss, num_tokens and the seconds belong together")
        return self


class _Update(_Tensors):
    round: Count
    num_examples: Count
    metrics: _Metrics
    settings: Annotated[dict[Word, FiniteFloat], Field(max_length=100)]
    score: _Score | None


class _Failure(Form):
    round: Count
    code: Word
    place: Name
    fix: Name


class _Report(Form):
    num_train: Count
    num_eval: Count
    num_cut: Count
    num_dropped: Count
    base_sha256: Word
    dtype: Word
    quantization: Word = ""
    optimizer: Word = ""
    threads: Count
    rank: Count = 0
    """At which the client trains LoRA's factors; 0 without such factors."""
    version: Word = ""
    code_sha256: Word = ""
    """Of the client's installed silotune, as it says itself; empty from earlier versions."""
    first_sha256: Word = ""
    """Of the adapter that its model begins with; empty from earlier versions."""


class _Process(Form):
    id: Name
    base_loads: Count
    peak_memory_bytes: Count


# --- broadcasts -------------------------------------------------------------------------------


def encode_broadcast(broadcast: Broadcast) -> Parcel:
    """The whole adapter, or, without one, the news. The same for all clients that get the same."""
    news = None if broadcast.adapter else broadcast.news
    extra = {f"extra/{purpose}": state for purpose, state in broadcast.extra.items()}
    down = {"adapter": broadcast.adapter} if news is None else {"news": news.payload}
    if broadcast.start:
        extra["start"] = broadcast.start
    layout, values = _flatten({**down, **extra})
    about = {"round": broadcast.round, "score": broadcast.score, "tensors": layout}
    if news is not None:
        about |= {"base": news.base, "changed": list(news.names)}
    return Parcel(about, values)


def decode_broadcast(parcel: Parcel) -> Broadcast:
    """Undo `encode_broadcast`.

    Raises:
        UpdateError: The parcel holds no broadcast.
    """
    form = read_form(_Broadcast, parcel.about)
    groups = _unflatten(form, parcel.values)
    news = None
    payload = groups.pop("news", {})
    if form.base is not None:
        news = News(form.base, tuple(form.changed), payload)
    if any(t.dtype != torch.float32 for state in groups.values() for t in state.values()):
        raise UpdateError("a message brings an adapter that is not float32.")
    adapter = groups.get("adapter", {})
    if (news is None and payload) or (news is not None and adapter):
        raise UpdateError("a message brings neither a whole adapter nor news alone.")
    start = groups.get("start", {})
    return Broadcast(form.round, adapter, _extra(groups), form.score, news, start)


# --- answers ----------------------------------------------------------------------------------


def encode_update(update: Update) -> Parcel:
    """An update without its client's name: the server knows whom it asked."""
    extra = {f"extra/{purpose}": state for purpose, state in update.extra.items()}
    layout, values = _flatten({"delta": update.delta, **extra})
    about = {
        "round": update.round,
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
        "settings": dict(update.settings),
        "score": _score_facts(update.score) if update.score else None,
        "tensors": layout,
    }
    return Parcel({"update": about}, values)


def encode_score(score: Score, round_: int) -> Parcel:
    """A score alone, in answer to an evaluate message."""
    return Parcel({"score": _score_facts(score), "round": round_}, no_values())


def encode_failure(failure: Failure) -> Parcel:
    """A failure: code, place and fix; its client's name stays out, as in `encode_update`."""
    facts = {k: v for k, v in asdict(failure).items() if k != "client"}
    return Parcel({"failure": facts}, no_values())


def decode_answer(parcel: Parcel, client: str, *, bytes_down: int) -> Update | Score | Failure:
    """An update, a score or a failure.

    Args:
        parcel: As it arrived.
        client: The client that the server asked.
        bytes_down: What was sent to that client.

    Raises:
        UpdateError: The parcel holds none of the three.
    """
    about = parcel.about
    check_keys(about, "update", "score", "failure")
    if "failure" in about:
        return read_failure(about["failure"], client)
    if "score" in about:
        facts = read_form(_Score, about["score"]).model_dump()
        return _checked(_score_of(client, facts, size_bytes=bytes_down))
    form = read_form(_Update, about.get("update"))
    groups = _unflatten(form, parcel.values)
    facts = form.model_dump(exclude={"tensors", "score"}, exclude_unset=True, exclude_none=True)
    score = None
    if form.score is not None:
        score = _checked(_score_of(client, form.score.model_dump()))
    return Update(
        client=client,
        delta=groups.get("delta", {}),
        extra=_extra(groups),
        score=score,
        bytes_down=bytes_down,
        bytes_up=parcel.values.nbytes,
        **facts,
    )


def decode_report(parcel: Parcel, client: str) -> dict[str, Any] | Failure:
    """What a client says about itself before the first round, or why it cannot take part.

    Raises:
        UpdateError: The parcel holds neither.
    """
    check_keys(parcel.about, "report", "failure")
    if "failure" in parcel.about:
        return read_failure(parcel.about["failure"], client)
    return read_form(_Report, parcel.about.get("report")).model_dump()


def decode_process(parcel: Parcel) -> dict[str, Any]:
    """What the process that answered says about itself.

    Raises:
        UpdateError: It says nothing.
    """
    return read_form(_Process, parcel.about.get("process")).model_dump()


BESIDE = ("round", "client", "process")
"""What an answer may have next to its one part."""


def read_failure(facts: object, client: str) -> Failure:
    """What a client says about its failure.

    Raises:
        UpdateError: It is not a failure's form.
    """
    return Failure(client, **read_form(_Failure, facts).model_dump())


def check_keys(about: Mapping[str, Any], *parts: str) -> None:
    """Refuse an answer with more than one part, or with text that nobody would read or count.

    Raises:
        UpdateError: Names the keys.
    """
    unknown = sorted(about.keys() - {*parts, *BESIDE})
    if unknown or sum(part in about for part in parts) > 1:
        what = unknown or [part for part in parts if part in about]
        raise _unreadable(what)


def _score_of(client: str, facts: Mapping[str, Any], *, size_bytes: int = 0) -> Score:
    counts = tuple(tuple(label) for label in facts["label_counts"])
    return Score(client=client, **{**facts, "label_counts": counts}, size_bytes=size_bytes)


def _checked(score: Score) -> Score:
    """Refuse a score that is not finite or contradicts itself: it would spoil everyone's curve."""
    if not math.isfinite(score.loss_sum):
        raise UpdateError(f"client '{score.client}': its held-out loss is not finite.")
    if not 0 <= score.loss_sum <= MAX_LOSS * score.num_tokens:
        raise UpdateError(f"client '{score.client}': its held-out loss is impossible.")
    if score.num_correct > score.num_tokens:
        raise UpdateError(f"client '{score.client}': its score has more hits than predictions.")
    preferred, margin = score.num_preferred, score.margin_sum
    if (preferred is None) != (margin is None) or (preferred or 0) > score.num_tokens:
        raise UpdateError(f"client '{score.client}': its score of pairs contradicts itself.")
    if abs(margin or 0.0) > MAX_LOSS * score.num_tokens:
        raise UpdateError(f"client '{score.client}': its reward margin is impossible.")
    if score.label_counts:
        right, given, true = (sum(part) for part in zip(*score.label_counts, strict=True))
        above = any(hit > min(a, b) for hit, a, b in score.label_counts)
        if above or (right, given, true) != (score.num_correct, score.num_tokens, score.num_tokens):
            raise UpdateError(f"client '{score.client}': its label counts contradict its score.")
    return score


def _score_facts(score: Score) -> dict[str, Any]:
    left_out = ("client", "size_bytes", *(() if score.label_counts else ("label_counts",)))
    facts = {k: v for k, v in asdict(score).items() if k not in left_out}
    return {k: v for k, v in facts.items() if v is not None}


# --- tensors ----------------------------------------------------------------------------------


TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
}
"""What may travel: changes and adapters as float32, or what a codec or a mask makes of them."""
NAMES = {dtype: name for name, dtype in TYPES.items()}


def _flatten(groups: Groups) -> tuple[list[Listed], np.ndarray]:
    layout: list[Listed] = []
    parts: list[Tensor] = []
    for group, state in groups.items():
        for name in sorted(state):
            tensor = state[name]
            assert tensor.dtype in NAMES, f"{name} is {tensor.dtype}, which is not sent"
            own = (group, name, list(tensor.shape))
            plain = tensor.dtype == torch.float32
            layout.append(own if plain else (*own, NAMES[tensor.dtype]))
            if tensor.numel():  # torch cannot see nothing as bytes
                parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    return layout, torch.cat(parts).numpy() if parts else no_values()


def _unflatten(form: _Tensors, values: np.ndarray) -> dict[str, dict[str, Tensor]]:
    flat = torch.from_numpy(values.copy())  # the received bytes are read-only
    groups: dict[str, dict[str, Tensor]] = {}
    at = 0
    for group, name, shape, *other in form.tensors:
        type_ = other[0] if other else "float32"
        if any(size < 0 for size in shape) or name in groups.get(group, {}):
            raise UpdateError(f"a message lists tensor '{name}' twice or with a negative size.")
        if type_ not in TYPES:
            raise UpdateError(
                f"a message brings '{name}' as {type_}, which is not accepted.\n"
                "  Install the same version of silotune on both sides."
            )
        size = math.prod(shape) * TYPES[type_].itemsize
        if at + size > flat.numel():
            raise UpdateError(f"a message holds fewer numbers than its tensors need ('{name}').")
        if math.prod(max(1, n) for n in shape) > 2**60:  # no numbers, and strides above 64 bits
            raise UpdateError(f"a message gives '{name}' an impossible shape.")
        own = flat[at : at + size] if size else torch.zeros(0, dtype=torch.uint8)
        if at % TYPES[type_].itemsize:
            own = own.clone()  # a number begins at a multiple of its size
        groups.setdefault(group, {})[name] = own.view(TYPES[type_]).reshape(shape)
        at += size
    if at != flat.numel():
        raise UpdateError("a message holds more numbers than its tensors need.")
    return groups


def _extra(groups: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {k.removeprefix("extra/"): v for k, v in groups.items() if k.startswith("extra/")}


def read_form(form: type[AnyForm], facts: object) -> AnyForm:
    """What arrived, if it has this form.

    Raises:
        UpdateError: It does not; the message names the keys, and no value.
    """
    try:
        return form.model_validate(facts)
    except ValidationError as error:
        raise _unreadable(
            {".".join(map(str, e["loc"][:2])) or "it" for e in error.errors(include_input=False)}
        ) from None


def _unreadable(keys: Iterable[str]) -> UpdateError:
    """Keys may be a client's: at most five are named, and not in full if they are long."""
    named = ", ".join(key[:100] for key in sorted(keys)[:5])
    return UpdateError(
        f"a message cannot be read: {named}.\n  Install the same version of silotune on both sides."
    )
