"""Training without a federation, in the same rounds: the arms that a federated run is measured by.

A lone client, or all rows in one place, trains as a client of a federation would that has no other:
same rounds, learning rates and batches, and what it learns is the result.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import load_tensors, save_tensors
from silotune.core.tree import add
from silotune.core.types import AdapterState, Broadcast
from silotune.federation.client import ClientData, Worker, take_part
from silotune.federation.metrics import Row
from silotune.recipes.schema import RunConfig
from silotune.training.loop import num_rows

Plan = dict[str, dict[int, int]]
"""Client -> round -> rows that it trained on in that round."""


def rows_trained(metrics: Sequence[Row], data: Mapping[str, ClientData], run: RunConfig) -> Plan:
    """What each client really did in a federated run; one that failed in a round did nothing."""
    plan: Plan = {name: {} for name in data}
    for row in metrics:
        if row["event"] == "train" and "num_tokens" in row:
            count = num_rows(run.train, len(data[row["client"]].examples))
            plan[row["client"]][row["round"]] = count
    return plan


def pooled(plan: Plan) -> dict[int, int]:
    """Round -> rows of all clients together."""
    rounds = sorted({r for own in plan.values() for r in own})
    return {r: sum(own.get(r, 0) for own in plan.values()) for r in rounds}


@dataclass(frozen=True)
class Cost:
    """What an arm took."""

    tokens: int = 0
    """Real tokens that were trained on, prompts included, padding excluded."""
    examples: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Of training alone."""
    bytes_up: int = 0
    bytes_down: int = 0
    head_bytes_up: int = 0
    """Of `bytes_up`, what a classification head took."""
    head_bytes_down: int = 0
    tokens_server: int = 0
    """What the server trained on rows of its own, teacher and student both."""
    seconds_server: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        sums = {key: value + getattr(other, key) for key, value in asdict(self).items()}
        return Cost(**sums)


def train_alone(
    worker: Worker,
    data: ClientData,
    plan: Mapping[int, int],
    first: AdapterState,
    place: Path,
) -> tuple[AdapterState, Cost]:
    """Train on one holder's rows, round by round as in a federation, without one.

    Args:
        worker: The base in memory and the recipe.
        data: The rows.
        plan: Round -> rows to train on. Learning rates are those of the rounds.
        first: Where it begins.
        place: Where its state is kept after every round; a call with the same place goes on.
    """
    adapter, cost, done, state = first, Cost(), 0, place / "adapter.safetensors"
    place.mkdir(parents=True, exist_ok=True)
    if state.is_file():
        adapter, about = load_tensors(state)
        done, cost = int(about["round"]), Cost(**json.loads(about["cost"]))
    for r, count in sorted(plan.items()):
        if r <= done:
            continue
        message = Broadcast(r, adapter, score=False)
        update = take_part(worker, data, message, place / "memory", count=count)
        adapter = add(adapter, update.delta)
        m = update.metrics
        cost += Cost(int(m["num_tokens"]), count, int(m["num_steps"]), m["seconds_training"])
        save_tensors(state, adapter, about={"round": str(r), "cost": json.dumps(asdict(cost))})
    return adapter, cost


OF_SUMMARY = ("head_bytes_up", "head_bytes_down", "tokens_server", "seconds_server")


def cost_of_run(rows: Sequence[Row], plan: Plan, summary: Mapping[str, Any]) -> Cost:
    """What a federated run took, by its metrics.jsonl and summary.json."""
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
