"""What a client does with the result by itself: a few more steps, and a share of them.

It happens where the rows are, after the last round, and nothing of it is sent.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.atomic_files import load_tensors, make_folder, save_tensors
from silotune.core.errors import ConfigError
from silotune.core.tree import add
from silotune.core.types import AdapterState, Broadcast
from silotune.core.wording import did_you_mean
from silotune.federation.client import ClientData, Worker, train_round
from silotune.federation.client_memory import ClientMemory, load_memory
from silotune.federation.client_privacy import Protection
from silotune.federation.run_folder import RunFolder
from silotune.privacy.base import PrivacyConfig
from silotune.training.loop import num_rows

FILE = "own.safetensors"
"""In a client's folder: its adapter after its own steps."""


@dataclass(frozen=True)
class OwnSteps:
    """The steps that one client has taken by itself."""

    adapter: AdapterState
    """After them, float32."""
    num_steps: int
    num_examples: int
    num_tokens: int
    seconds: float
    """Only of training."""


def take_own_steps(
    worker: Worker,
    data: ClientData,
    start: AdapterState,
    *,
    position: int,
    num_steps: int,
    lr: float,
) -> OwnSteps:
    """Train plain local steps from an adapter, as in one more round of FedAvg.

    Without noise, also under [privacy]: nothing leaves the client.

    Args:
        worker: The base in memory; its adapter tensors are overwritten. Its recipe sets the batch,
            the optimizer, and the seed. Its algorithm has no part in this.
        data: The client's rows.
        start: All trained tensors, the client's personal ones included.
        position: Rows that the client has taken from its stream: it goes on with the next ones.
        num_steps: Optimizer steps.
        lr: Their learning rate.

    Raises:
        UpdateError: Training ended in NaN or infinity.
    """
    run = worker.run
    changes = {"local_steps": num_steps, "local_epochs": None, "lr": lr}
    train = run.train.model_copy(update={**changes, "lr_min": 0.0, "schedule": "constant"})
    plain = run.model_copy(update={"train": train, "privacy": PrivacyConfig()})
    alone = replace(worker, run=plain, algorithm=fedavg(FedAvgConfig()), keeps_optimizer=False)
    round_, count = run.rounds + 1, num_rows(train, data.num_train)
    update, _ = train_round(
        alone,
        data,
        Broadcast(round_, start, score=False),
        ClientMemory(position),
        Protection(plain, data.name, round_, plan=None),
        count=count,
    )
    m = update.metrics
    return OwnSteps(
        add(start, update.delta),
        num_steps=int(m["num_steps"]),
        num_examples=count,
        num_tokens=int(m["num_tokens"]),
        seconds=m["seconds_training"],
    )


def interpolated(start: AdapterState, own: AdapterState, share: float) -> AdapterState:
    """(1 - share) * start + share * own, tensor by tensor; at 0 and 1, one of them bit for bit.

    The two factors of LoRA are interpolated, not their product. With a for the share, and a
    dash for the client's own: (1-a)^2 BA + a^2 B'A' + a(1-a) (BA' + B'A). So the rank stays.

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903: weights
        before and after fine-tuning. Theirs are whole weights, where the product does not arise.
    """
    if share in (0, 1):
        return dict(own if share else start)
    return {name: (1 - share) * start[name] + share * own[name] for name in start}


def best_share(shares: Sequence[float], loss: Callable[[float], float]) -> tuple[float, float]:
    """The share with the lowest loss, and this loss; of equal ones the smallest share.

    Args:
        shares: At least one.
        loss: Of a share, on the client's validation rows.
    """
    found = {share: loss(share) for share in sorted(shares)}
    known = {share: value if math.isfinite(value) else math.inf for share, value in found.items()}
    best = min(known, key=known.__getitem__)
    return best, known[best]


def keep_own(folder: Path, own: AdapterState, *, share: float) -> None:
    """Write a client's adapter after its own steps into its own folder."""
    make_folder(folder)
    save_tensors(folder / FILE, own, about={"share": json.dumps(share)})


def personal(folder: RunFolder, client: str) -> AdapterState:
    """The tensors that a client of a finished run keeps to itself; {} if there are none."""
    memory = load_memory(folder.client_folder(client), folder.run.rounds + 1)
    return memory.tensors.get("personal", {})


def as_a_client_has_it(
    folder: RunFolder, client: str, result: AdapterState, known: Mapping[str, object]
) -> AdapterState:
    """A run's result as one of its clients has it: with its own tensors, after its own steps.

    Args:
        folder: The finished run.
        client: Its name.
        result: The tensors of the run's result.
        known: The run's clients.

    Raises:
        ConfigError: There is no such client, or it keeps nothing of its own here.
        RunFolderError: Its file is damaged.
    """
    if client not in known:
        raise ConfigError(
            f"there is no client '{client}' in this run.{did_you_mean(client, known)}\n"
            f"  The clients are: {', '.join(sorted(known))}."
        )
    start = {**result, **personal(folder, client)}
    place = folder.client_folder(client) / FILE
    if place.is_file():
        own, about = load_tensors(place, fix="Restore it from a copy, or run the recipe again.")
        begun = {name: start[name].to(own[name].dtype) for name in own}
        return {**start, **interpolated(begun, own, json.loads(about["share"]))}
    keeps = folder.run.algorithm.facts.keeps  # a client that was never asked has its first value
    if folder.run.finish.local_steps or not (keeps or personal(folder, client)):
        raise ConfigError(
            f"client '{client}' keeps nothing of its own in this run folder.\n"
            "  Leave out the client, or run a recipe with finish.local_steps, adapter.head = "
            "'local' or algorithm.name = 'fedsa_lora'."
        )
    return start
