"""How much each client's updates improved the others: two estimates from a run's kept updates.

Leave one out: the rounds are aggregated again without a client (replay.py), and the held-out losses
of the others are compared. Gradient: what each update promised to first order (row_gradients.py).
Neither trains anything. docs/contribution.md says what they do not say.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from silotune.core.algorithm import Algorithm, starting_state
from silotune.core.atomic_files import free_place, make_folder, write_json, write_rows
from silotune.core.checksums import check_listed, list_files
from silotune.core.errors import ConfigError, RunFolderError, UpdateError
from silotune.core.public_call import public
from silotune.core.reading_back import read_object
from silotune.core.types import AdapterState, ServerState
from silotune.data.client_rows import ClientRows
from silotune.federation.kept_updates import KeptUpdates, kept_updates
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import LoadedModel, read_adapter, write_adapter
from silotune.recipes.personal import kept_by, what_is_kept
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.results.summary import unit_of
from silotune.runtime.flower.strategy import algorithm_of
from silotune.training.known_tokens import prepare_rows
from silotune.training.scoring import RowScore, score_each
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Example, Task
from silotune.workflows.check import check, has_real_clients
from silotune.workflows.contribution.measured import RowDifferences, client_numbers
from silotune.workflows.contribution.replay import replay
from silotune.workflows.contribution.row_gradients import adds_up, promised, shares
from silotune.workflows.provenance import check_same_rows

FILE, ROWS = "contribution.json", "rows.jsonl"
REPLAYED = (
    "leave one out is a replay, not a retraining: without a client, the others would have sent "
    "other updates from the second round on"
)
ROWS_ONLY = "intervals are over held-out rows; another seed of the run would give other numbers"
NO_SUM = (
    "the server's step is not the sum of the clients' parts (it has an optimizer, or takes no mean "
    "of the updates), so gradient is about the mean of the updates and not about the step"
)


@dataclass(frozen=True)
class Contribution:
    """What each client contributed, in one folder inside the run folder."""

    path: Path
    """Holds contribution.json, and the differences of single rows as JSONL."""

    @property
    def result(self) -> dict[str, Any]:
        """contribution.json: both estimates of every client, what they cost, and notes.

        Raises:
            RunFolderError: The file is damaged.
        """
        fix = f"Remove {self.path}, and measure again."
        check_listed(self.path, FILE, fix=fix)
        return read_object(self.path / FILE, fix=fix)


@public
def contribution(run: Run | Path | str, *, progress: Progress | None = None) -> Contribution:
    """Estimate how much each client's updates improved the others, from the run's kept updates.

    Both estimates are in nats per target of the other clients' held-out rows, a mean over those
    clients, and positive if the client's updates lowered their loss. Nothing is trained.

    Args:
        run: A finished run with checkpoint.keep_updates = true, or its folder.
        progress: Receives progress messages; silent by default.

    Returns:
        The estimates, in a new folder inside the run folder.

    Raises:
        ConfigError: The recipe does not allow it: no kept updates, real clients, [privacy], a
            server that trains, local heads, or a single client.
        RunFolderError: The run is not finished, an update is gone or damaged, the rows have
            changed, or a replay with all clients does not give the run's adapter.
        ModelError: The base has changed.
        QuorumError: The algorithm cannot combine a round's updates without one of them.
        UpdateError: Without a client, the replayed adapter is of no use: its losses are not finite.
    """
    run, progress = run if isinstance(run, Run) else Run(Path(run)), progress or Progress()
    summary, config = run.summary, run.config
    algorithm = algorithm_of(config.algorithm)
    check_possible(run.path, config, algorithm)
    checked = check(config)
    check_same_rows(RunFolder.open(run.path), checked)
    rounds = _rounds_of(run, summary["result_round"], checked.rows)
    run.check_base()
    progress.note(f"loading {config.model.name}")
    loaded = load_for(config)
    adapter = read_adapter(loaded)
    first = starting_state(algorithm, adapter, len(checked.rows))
    work = _Work(config, algorithm, loaded, first, rounds, _examples(config, loaded, checked.rows))
    try:
        progress.note("replay with all clients")
        *_, last = replay(algorithm, first, rounds)
        _check_same(run, last, loaded)
        differences = work.differences(last, work.promises(progress), progress)
    finally:
        progress.end()
    return _save(run, summary, work, differences)


def check_possible(path: Path, run: RunConfig, algorithm: Algorithm) -> None:
    """Refuse what cannot, or must not, be replayed.

    Raises:
        ConfigError: It is one of these.
    """
    why, fix = "", "Measure a run without it."
    if run.privacy.unit != "none":
        why = (
            f"privacy.unit = '{run.privacy.unit}': single updates and held-out losses have no "
            "noise, so a contribution would say more than the run's guarantee allows"
        )
    elif has_real_clients(run):
        why = "its clients are real and keep their rows, which are needed here"
        fix = "Measure a simulation with checkpoint.keep_updates=true."
    elif not run.checkpoint.keep_updates:
        why = "its updates were removed after every round"
        fix = "Run the recipe again with checkpoint.keep_updates=true."
    elif run.server.work != "none":
        why = (
            f"server.work = '{run.server.work}': what the server learned between rounds is not kept"
        )
    elif kept := kept_by(run):
        why = f"{kept}: every client scores with its own {what_is_kept(run)}, which is not kept"
    elif algorithm.layout is not None or algorithm.tailor is not None:
        why = f"algorithm.name = '{algorithm.name}': its clients train tensors of different shapes"
    elif run.adapter.ranks:
        why = "adapter.ranks: its clients train tensors of different shapes"
    elif run.algorithm.facts.core:
        why = (
            f"algorithm.name = '{algorithm.name}': what a core means depends on the factors around "
            "it, which the first two rounds of all clients have made"
        )
    elif run.algorithm.facts.residual:
        why = (
            f"algorithm.name = '{algorithm.name}': what it keeps beside the adapter has another "
            "size in every round"
        )
    if why:
        raise ConfigError(f"{path} has no contributions to measure: {why}.\n  {fix}")


def _rounds_of(
    run: Run, num_rounds: int, rows: Mapping[str, ClientRows]
) -> Mapping[int, KeptUpdates]:
    if len(rows) < 2:
        raise ConfigError(
            f"{run.path} has a single client, so there are no others to contribute to.\n"
            "  Measure a run with two or more clients."
        )
    if num_rounds == 0:
        raise RunFolderError(
            f"{run.path} ended before its first round did, so nobody contributed.\n"
            "  Measure a run with one or more rounds."
        )
    return kept_updates(run.path, run.metrics, num_rounds)


def _examples(
    run: RunConfig, loaded: LoadedModel, rows: Mapping[str, ClientRows]
) -> dict[str, Sequence[Example]]:
    task = build_task(run.task, run.data.labels, run.prefer)
    return {
        name: prepare_rows(own.evaluation, task, loaded, run.train.max_length).examples
        for name, own in sorted(rows.items())
    }


def _check_same(run: Run, state: ServerState, loaded: LoadedModel) -> None:
    """A replay with all clients must give the result, bit for bit."""
    saved = run.adapter()
    for name, tensor in state.adapter.items():
        if name not in saved and not loaded.has_adapter:
            continue  # of a whole model, tied tensors are saved once
        if name not in saved or not torch.equal(saved[name].to(tensor.dtype), tensor):
            raise RunFolderError(
                f"{run.path}: a replay of its updates does not give its adapter; '{name}' "
                "differs.\n  Use the machine and versions in provenance.json, or train again."
            )


@dataclass(frozen=True)
class _Work:
    """What both estimates need."""

    run: RunConfig
    algorithm: Algorithm
    loaded: LoadedModel
    first: ServerState
    rounds: Mapping[int, KeptUpdates]
    examples: Mapping[str, Sequence[Example]]
    """Held-out rows by client."""

    @property
    def task(self) -> Task:
        return build_task(self.run.task, self.run.data.labels, self.run.prefer)

    def took_part(self, client: str) -> int:
        """Number of rounds."""
        return sum(client in kept.clients for kept in self.rounds.values())

    def promises(self, progress: Progress) -> dict[str, dict[str, np.ndarray]]:
        """First-order estimates, [whose updates][whose rows] -> (rows,)."""
        found = {
            name: {other: np.zeros(len(own)) for other, own in self.examples.items()}
            for name in self.examples
        }
        states = replay(self.algorithm, self.first, self.rounds)
        for (round_, kept), state in zip(sorted(self.rounds.items()), states, strict=False):
            progress.note(f"gradients of held-out rows, round {round_} of {len(self.rounds)}")
            parts = shares(kept, self.run.algorithm)
            own = promised(self.loaded, self.task, state.adapter, parts, self.examples)
            for other, table in own.items():
                for name, values in zip(parts, table, strict=True):
                    found[name][other] += values
        return found

    def differences(
        self,
        last: ServerState,
        promises: Mapping[str, Mapping[str, np.ndarray]],
        progress: Progress,
    ) -> dict[str, dict[str, RowDifferences]]:
        """[whose updates][whose rows], never a client's own."""
        with_all = {name: self._score(last.adapter, name) for name in self.examples}
        found = dict[str, dict[str, RowDifferences]]()
        for name in self.examples:
            others = [other for other in self.examples if other != name]
            without = {other: with_all[other] for other in others}
            if self.took_part(name):
                progress.note(f"replay without {name}")
                *_, state = replay(self.algorithm, self.first, self.rounds, without=name)
                without = {other: self._score(state.adapter, other) for other in others}
            found[name] = {
                other: RowDifferences(
                    num_targets=np.array([score.num_tokens for score in without[other]], float),
                    leave_one_out=np.array(
                        [
                            score.loss_sum - before.loss_sum
                            for score, before in zip(without[other], with_all[other], strict=True)
                        ]
                    ),
                    gradient=promises[name][other],
                )
                for other in others
            }
        return found

    def _score(self, adapter: AdapterState, client: str) -> list[RowScore]:
        write_adapter(self.loaded, adapter)
        size = self.run.evaluate.batch_size
        found = score_each(self.loaded, self.examples[client], self.task, batch_size=size)
        if not all(math.isfinite(score.loss_sum) for score in found):
            raise UpdateError(
                f"client '{client}': under the adapter of a replay, the loss of its held-out rows "
                "is not finite.\n  Train again with a lower train.lr or algorithm.server_lr."
            )
        return found

    def cost(self) -> dict[str, int]:
        """Replays, and rows that went through the model."""
        total = sum(len(own) for own in self.examples.values())
        asked = [name for name in self.examples if self.took_part(name)]
        return {
            "replays": 2 + len(asked),  # with all clients: to check, and for the gradients
            "rows_forward": total + sum(total - len(self.examples[name]) for name in asked),
            "rows_backward": total * len(self.rounds),
        }


def _save(
    run: Run,
    summary: Mapping[str, Any],
    work: _Work,
    differences: Mapping[str, Mapping[str, RowDifferences]],
) -> Contribution:
    clients = {
        name: {"num_rounds": work.took_part(name), **numbers}
        for name, numbers in client_numbers(differences).items()
    }
    result = {
        "run": run.path.name,
        "algorithm": work.algorithm.name,
        "result_round": summary["result_round"],
        "unit": unit_of(summary),
        "clients": clients,
        "cost": work.cost(),
        "notes": [REPLAYED, ROWS_ONLY, *([] if adds_up(work.run.algorithm) else [NO_SUM])],
    }
    place = free_place(run.path / "contributions" / time.strftime("%Y-%m-%d-%H%M%S"))
    make_folder(place)
    write_rows(place / ROWS, _rows(differences))
    write_json(place / FILE, result)
    list_files(place, [FILE, ROWS])
    return Contribution(place)


def _rows(differences: Mapping[str, Mapping[str, RowDifferences]]) -> list[Row]:
    """One per client and held-out row of another, without its text."""
    return [
        {
            "client": name,
            "rows_of": other,
            "row": i,
            "num_targets": int(own.num_targets[i]),
            "leave_one_out": float(own.leave_one_out[i]),
            "gradient": float(own.gradient[i]),
        }
        for name, others in differences.items()
        for other, own in others.items()
        for i in range(len(own.num_targets))
    ]
