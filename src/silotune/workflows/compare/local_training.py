"""Training without a federation, in the same rounds: the arms to compare a federated run with.

A lone client, or all rows in one place, trains like the only client of a federation: with the same
rounds, learning rates and batches. Whatever it learns is the result.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import load_tensors, make_folder, save_tensors
from silotune.core.tree import add
from silotune.core.types import AdapterState, Broadcast
from silotune.federation.client import ClientData, Worker, take_part
from silotune.federation.client_memory import check_memory, load_memory
from silotune.federation.metrics import Row
from silotune.recipes.schema import RunConfig
from silotune.training.loop import num_rows

Plan = dict[str, dict[int, int]]
"""Client -> round -> rows that it trained on in that round."""


def rows_trained(metrics: Sequence[Row], data: Mapping[str, ClientData], run: RunConfig) -> Plan:
    """What each client actually did in a federated run; a client that failed did nothing."""
    plan: Plan = {name: {} for name in data}
    for row in metrics:
        if row["event"] == "train" and "num_tokens" in row:
            count = num_rows(run.train, data[row["client"]].num_train)
            plan[row["client"]][row["round"]] = count
    return plan


def pooled(plan: Plan) -> dict[int, int]:
    """Round -> number of rows of all clients together."""
    rounds = sorted({r for own in plan.values() for r in own})
    return {r: sum(own.get(r, 0) for own in plan.values()) for r in rounds}


@dataclass(frozen=True)
class Cost:
    """The cost of an arm."""

    tokens: int = 0
    """Tokens that were trained on, including prompts and excluding padding."""
    examples: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Only of training."""
    bytes_up: int = 0
    bytes_down: int = 0
    head_bytes_up: int = 0
    """The classification head's part of `bytes_up`."""
    head_bytes_down: int = 0
    tokens_server: int = 0
    """Tokens that the server trained on, for teacher and student."""
    seconds_server: float = 0.0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Cost":
        """The cost in a part.json."""
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})

    def __add__(self, other: "Cost") -> "Cost":
        sums = {key: value + getattr(other, key) for key, value in asdict(self).items()}
        return Cost(**sums)


@dataclass(frozen=True)
class Trained:
    """The result of training an arm once."""

    adapter: AdapterState
    cost: Cost
    round: int = 0
    """The round that it is from: the best one by validation, or the last."""
    validation_loss: float | None = None
    share: float | None = None
    """Of a client's own steps, if one was chosen."""


@dataclass(frozen=True)
class Validation:
    """How the rounds of a training are scored, so that the best one can be taken."""

    loss: Callable[[AdapterState], float]
    every: int
    """Rounds between two scores; the last round is always scored."""
    picks_round: bool
    """Whether the best round is taken, or the last."""


def train_alone(
    worker: Worker,
    data: ClientData,
    plan: Mapping[int, int],
    first: AdapterState,
    place: Path,
    validation: Validation | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train on one holder's rows, in the rounds of a federation but without one.

    Args:
        worker: The base in memory and the recipe.
        data: The rows.
        plan: Round -> number of rows to train on. Each round has its own learning rate.
        first: The adapter to start from.
        place: Where the state is saved after every round. A call with the same folder resumes.
        validation: How rounds are scored; not at all if absent.
        tell: Called when a round begins, with the rounds done and their number.

    Raises:
        UpdateError: Training ended in NaN or infinity.
    """
    now, state, best_place = _State(), place / "adapter.safetensors", place / "best.safetensors"
    adapter, last = first, max(plan, default=0)
    make_folder(place)
    if state.is_file():
        adapter, about = load_tensors(state)
        now = _State.of(json.loads(about["state"]))
        check_memory(place / "memory", now.round)
    for r, count in sorted(plan.items()):
        if r <= now.round:
            continue
        tell(now.round, last)
        message = Broadcast(r, adapter, score=False)
        update = take_part(worker, data, message, place / "memory", count=count)
        adapter = add(adapter, update.delta)
        m = update.metrics
        spent = Cost(int(m["num_tokens"]), count, int(m["num_steps"]), m["seconds_training"])
        now = replace(now, round=r, cost=now.cost + spent)
        if validation is not None and (r % validation.every == 0 or r == last):
            loss = validation.loss(adapter)
            if not validation.picks_round or now.loss is None or loss < now.loss:
                now = replace(now, best=r, loss=loss if math.isfinite(loss) else None)
                save_tensors(best_place, adapter, about={})
        save_tensors(state, adapter, about={"state": json.dumps(asdict(now))})
    if now.best:
        adapter, _ = load_tensors(best_place)
    return Trained(adapter, now.cost, now.best or last, now.loss)


def trained_alone(place: Path, first: AdapterState) -> tuple[AdapterState, int]:
    """What `train_alone` has arrived at in a folder, and how many rows the holder has taken.

    Args:
        place: As in `train_alone`, which has finished there.
        first: The result of a holder that was never asked to train.
    """
    if not (path := place / "adapter.safetensors").is_file():
        return first, 0
    adapter, about = load_tensors(path)
    now = _State.of(json.loads(about["state"]))
    if now.best:
        adapter, _ = load_tensors(place / "best.safetensors")
    return adapter, load_memory(place / "memory", now.round + 1).position


@dataclass(frozen=True)
class _State:
    """Where a training without a federation is."""

    round: int = 0
    cost: Cost = Cost()
    best: int = 0
    """The round in best.safetensors; 0 if none was scored."""
    loss: float | None = None
    """Its loss on the validation rows."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "_State":
        return cls(**{**record, "cost": Cost.of(record["cost"])})


OF_SUMMARY = ("head_bytes_up", "head_bytes_down", "tokens_server", "seconds_server")


def cost_of_run(rows: Sequence[Row], plan: Plan, summary: Mapping[str, Any]) -> Cost:
    """The cost of a federated run, from its metrics.jsonl and summary.json."""
    trained = [row for row in rows if row["event"] == "train" and "num_tokens" in row]
    return Cost(
        tokens=sum(int(row["num_tokens"]) for row in trained),
        examples=sum(count for own in plan.values() for count in own.values()),
        steps=sum(int(row["num_steps"]) for row in trained),
        seconds=sum(row["seconds_training"] for row in trained),
        bytes_up=sum(row.get("bytes_up", 0) for row in rows),
        bytes_down=sum(row.get("bytes_down", 0) for row in rows),
        **{key: summary[key] for key in OF_SUMMARY if key in summary},
    )
