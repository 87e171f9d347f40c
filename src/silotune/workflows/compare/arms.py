"""Train and score the arms of a comparison, all on one base in memory.

Each arm writes its parts into the comparison's folder. A finished part (it has a `part.json`) is
never trained again; an interrupted part resumes after its last round. This file does not know what
the scores mean.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.compression.config import WireConfig
from silotune.core.atomic_files import make_folder, write_json, write_rows
from silotune.core.checksums import list_files
from silotune.core.errors import QuorumError, UpdateError, first_line
from silotune.core.lora import at_rank
from silotune.core.types import AdapterState
from silotune.core.wording import human_seconds
from silotune.federation.client import ClientData, Worker
from silotune.federation.client_data import ScoredTokens, TrainTokens, known_tokens
from silotune.federation.client_memory import folder_name
from silotune.federation.metrics import Row, held_out_losses
from silotune.federation.own_steps import personal
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import build_lesson, is_pretrained, pretrain, server_rows
from silotune.models.loading import LoadedModel, save_adapter, untrained, write_adapter
from silotune.recipes.arms import federated_arms
from silotune.recipes.personal import kept_by
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import CompareConfig, FinishConfig, StopConfig
from silotune.recipes.tuning import Point
from silotune.results.run import Run
from silotune.runtime.inprocess import prepare_clients
from silotune.training.scoring import evaluate
from silotune.training.tasks import build_task
from silotune.workflows.check import Checked
from silotune.workflows.compare.folder import (
    CENTRALIZED,
    ComparisonFolder,
    Trial,
    num_parts,
    place_alone,
    place_of,
    place_of_trial,
    read_trial,
    tuning_seed,
)
from silotune.workflows.compare.held_out import prepare_held_out, score_held_out
from silotune.workflows.compare.local_training import (
    Cost,
    Trained,
    Validation,
    cost_of_run,
    rows_trained,
    train_alone,
)
from silotune.workflows.compare.names import LOCAL
from silotune.workflows.provenance import provenance_of
from silotune.workflows.run import run_in
from silotune.workflows.shared_base import SharedBase

Train = Callable[[Path], Trained]
"""Trains a part in its folder."""


class Arms:
    """Trains and scores arms: one base in memory, the clients' tokens, and the folder of parts."""

    def __init__(
        self,
        folder: ComparisonFolder,
        checked: Checked,
        groups: Mapping[str, tuple[str, ...]],
        progress: Progress,
    ) -> None:
        """Load the base and tokenize the rows; nothing is trained yet.

        Args:
            folder: Where parts go.
            checked: The recipe and its rows.
            groups: The group of each held-out row, by client; empty if rows are not grouped.
            progress: Told what happens.
        """
        self.folder, self.checked, self.progress = folder, checked, progress
        self.run = run = checked.run
        self.has_validation = run.data.validation_fraction > 0
        self.recipes = federated_arms(run)
        # what is personal is kept for the last round only, and losses of rows have no noise
        keeps_last = any(kept_by(r) or r.algorithm.result_differs for r in self.recipes.values())
        self.picks_round = self.has_validation and run.privacy.unit == "none" and not keeps_last
        self.task = build_task(run.task, run.data.labels, run.prefer)
        progress.note(f"comparison folder: {folder.path}")
        progress.note(f"loading {run.model.name}")
        self.base_model = SharedBase(run, progress)
        provenance_of(folder, checked, self.loaded)
        self.data = prepare_clients(checked.rows, self.worker(run))
        everything = tuple(e for own in self.data.values() for e in own.examples)
        self.server_rows = server_rows(run)
        if self.server_rows:  # the centralized arm trains on them, too
            everything += build_lesson(run, self.server_rows, self.loaded).examples
        self.pool = known_tokens(CENTRALIZED, TrainTokens(everything), ScoredTokens((), 0))
        self.held = {
            name: prepare_held_out(
                checked.rows[name], groups.get(name, ()), self.task, self.loaded, run
            )
            for name in self.data
        }
        self.num_parts, self.num_done = num_parts(run, len(self.data)), 0

    @property
    def loaded(self) -> LoadedModel:
        """The base with its current adapter."""
        return self.base_model.loaded

    def worker(self, run: RunConfig) -> Worker:
        """A worker without a federation: whatever it learns is the result."""
        nothing_travels = run.model_copy(update={"wire": WireConfig()})
        return Worker(self.loaded, self.task, nothing_travels, fedavg(FedAvgConfig()))

    # --- arms

    def base(self) -> None:
        """Score the untrained base."""
        first = self.base_model.dress(self.recipe(self.run, self.run.seed))
        with untrained(self.loaded):
            self.part("base", "the base", lambda _: Trained(first, Cost()), self.data, seed=None)

    def federated(self, arm: str, point: Point, seed: int) -> Run:
        """Run an arm's recipe with this seed, as `silotune run` would."""
        place = place_of(arm, seed)
        path = self.folder.path / place / "run"
        train = self._federation(arm, point, seed)
        self.part(place, arm, train, self.data, seed=seed, memory=path)
        return Run(path)

    def alone(self, client: str, point: Point, seed: int, plan: Mapping[int, int]) -> None:
        """One client without the others: the same rows and steps."""
        place = place_alone(client, seed)
        scored = self.data if client in self.run.compare.only else [client]
        train = self._alone(self.data[client], point, seed, plan)
        self.part(place, f"{client} alone", train, scored, seed=seed)

    def centralized(self, point: Point, seed: int, plan: Mapping[int, int]) -> None:
        """All rows in one place."""
        train = self._alone(self.pool, point, seed, plan)
        self.part(place_of(CENTRALIZED, seed), CENTRALIZED, train, self.data, seed=seed)

    # --- trials: trained with the seed of tuning, and scored on the validation rows only

    def try_federated(self, arm: str, point: Point) -> tuple[Trial, Run]:
        """One trial of a federated arm."""
        place = place_of_trial(arm, point.label)
        train = self._federation(arm, point, tuning_seed(self.run))
        return self.trial(place, f"tuning {arm}: {point.label}", train), Run(
            self.folder.path / place / "run"
        )

    def try_alone(self, client: str | None, point: Point, plan: Mapping[int, int]) -> Trial:
        """One trial of a lone client, or of all rows in one place."""
        arm = f"{LOCAL}/{folder_name(client)}" if client is not None else CENTRALIZED
        data = self.data[client] if client is not None else self.pool
        train = self._alone(data, point, tuning_seed(self.run), plan)
        who = f"{client} alone" if client is not None else CENTRALIZED
        return self.trial(place_of_trial(arm, point.label), f"tuning {who}: {point.label}", train)

    # --- training

    def _federation(self, arm: str, point: Point, seed: int) -> Train:
        run = self.recipe(point.run, seed)

        def train(place: Path) -> Trained:
            path = place / "run"
            taught = self._with_teacher(run, self.recipe(self.recipes[arm], seed))
            opened = RunFolder.open(path) if path.exists() else RunFolder.create(path, taught)
            self.base_model.dress(run)  # before `self.loaded` is read: this may replace it
            with opened.locked():
                done = run_in(
                    opened,
                    replace(self.checked, run=taught),
                    self.progress,
                    began=time.perf_counter(),
                    loaded=self.loaded,
                    data=self.data,
                )
            plan = rows_trained(done.metrics, self.data, run)
            trained = {n: t for n, t in done.adapter().items() if n in self.loaded.parameters}
            at = done.summary["result_round"]
            loss = held_out_losses(done.metrics).get(at) if self.has_validation else None
            return Trained(trained, cost_of_run(done.metrics, plan, done.summary), at, loss)

        return train

    def _alone(self, data: ClientData, point: Point, seed: int, plan: Mapping[int, int]) -> Train:
        run = self.recipe(point.run, seed)

        def train(place: Path) -> Trained:
            first = self.base_model.dress(run)  # first, because the worker keeps `self.loaded`
            if data is not self.pool:  # alone, a client trains what it can train in the federation
                first = at_rank(first, run.adapter.rank_of(data.name))
            worker = replace(self.worker(run), keeps_optimizer=point.keeps_optimizer)
            validation = None
            if self.has_validation:
                names = list(self.data) if data is self.pool else [data.name]
                every = self.run.compare.every if self.picks_round else run.rounds
                validation = Validation(
                    lambda adapter: self.validation_loss(names, adapter), every, self.picks_round
                )
            tell = partial(self.progress.doing, "training without the others")
            done = train_alone(worker, data, plan, first, place / "state", validation, tell)
            if self.loaded.has_adapter:
                write_adapter(self.loaded, done.adapter)
                save_adapter(self.loaded, place / "adapter", base=self.run.model)
            return done

        return train

    def validation_loss(self, names: Sequence[str], adapter: AdapterState) -> float:
        """The loss on these clients' validation rows, weighted as a run does it."""
        write_adapter(self.loaded, adapter)
        rows: list[Row] = []
        for name in names:
            own = self.data[name]
            found = evaluate(
                self.loaded,
                own.scored.batches,
                self.task,
                client=name,
                num_examples=own.scored.num_rows,
            )
            about = {
                "event": "evaluate",
                "status": "ok",
                "round": 0,
                "num_tokens": found.num_tokens,
            }
            rows.append({**about, "loss": found.loss_sum / found.num_tokens})
        return held_out_losses(rows)[0]

    def recipe(self, recipe: RunConfig, seed: int) -> RunConfig:
        """An arm's recipe with a seed, on the rows of the first seed."""
        run = self.run
        fixed = run.data.split_seed if run.data.split_seed is not None else run.seed
        # without a history, only the comparison scores the end. Without validation rows, the best
        # round would be the federation's only, chosen by the rows that compare, or by its server's
        every = run.evaluate.every if run.compare.history else 0
        checkpoint = run.checkpoint.model_copy(update={"keep": "last"})
        if self.picks_round:
            every = run.compare.every
            checkpoint = run.checkpoint.model_copy(update={"every": 1, "keep": "best"})
        elif self.has_validation and not every:
            every = run.rounds
        return recipe.model_copy(
            update={
                "seed": seed,
                "data": run.data.model_copy(update={"split_seed": fixed}),
                "evaluate": run.evaluate.model_copy(
                    update={"every": every, "server_path": None, "choose_by": "clients"}
                ),
                "checkpoint": checkpoint,
                "report": run.report.model_copy(update={"page": False, "samples": 0}),
                "stop": StopConfig(),  # equal examples; every arm's best round counts anyway
                "compare": CompareConfig(),
                "finish": FinishConfig(),  # arms of their own, see own_arms.py
            }
        )

    def _with_teacher(self, run: RunConfig, untuned: RunConfig) -> RunConfig:
        """The recipe with a trained teacher, trained once for all arms of a seed that share it.

        It is trained as the arm's untuned recipe says, so all points of an arm share it.
        """
        how = run.distill
        asked = run.server.work == "distill" and how.pretrain_epochs > 0
        if not asked or is_pretrained(how.teacher or ""):
            return run
        rate = how.lr or run.server.lr
        about = [how.teacher, how.pretrain_epochs, rate, untuned.train.model_dump()]
        mark = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        place = self.folder.path / f"seed-{run.seed}" / f"teacher-{mark}"
        if not place.exists():
            pretrain(
                untuned,
                place,
                self.progress,
                rows=self.server_rows,
                tokenizer=self.loaded.tokenizer,
            )
        taught = how.model_copy(update={"teacher": str(place)})
        return run.model_copy(update={"distill": taught})

    # --- parts

    def part(
        self,
        place: str,
        title: str,
        train: Train,
        clients: Sequence[str] | Mapping[str, Any],
        *,
        seed: int | None,
        memory: Path | None = None,
    ) -> None:
        """Train a part and score the held-out rows, unless it is finished.

        Args:
            place: Its folder, inside the comparison's folder.
            title: Its name in progress messages.
            train: Takes the folder and trains.
            clients: The clients whose held-out rows it is scored on.
            seed: Absent for what no seed changes.
            memory: The run folder where clients keep personal tensors.
        """
        title = title if seed is None else f"seed {seed}, {title}"
        if (folder := self._begin(place, title)) is None:
            return
        done = train(folder)
        # the report shows answers of the first seed only, and they take longer than scores
        shown = list(self.data)[: self.run.report.samples if seed in (None, self.run.seed) else 0]
        rows: list[Row] = []
        for n, client in enumerate(clients):
            self.progress.doing("scoring held-out rows", n, len(clients))
            write_adapter(self.loaded, {**done.adapter, **self._kept(memory, client)})
            found = score_held_out(
                self.loaded, self.task, self.run, self.held[client], is_shown=client in shown
            )
            rows += [{"client": client, **row} for row in found]
        write_rows(folder / "scores.jsonl", rows)
        self._finish(folder, done, ["scores.jsonl", "part.json"])

    def trial(self, place: str, title: str, train: Train) -> Trial:
        """Train a trial, unless it is finished. One that diverges is a trial without a loss."""
        if (folder := self._begin(place, title)) is not None:
            try:
                done = train(folder)
            except (UpdateError, QuorumError) as error:
                self.progress.note(f"  failed: {first_line(str(error))}")
                done = Trained({}, Cost())
            self._finish(folder, done, ["part.json"])
        return read_trial(self.folder.path / place)

    def _begin(self, place: str, title: str) -> Path | None:
        """Create a part's folder; None if the part is finished."""
        self.num_done += 1
        folder = self.folder.path / place
        if (folder / "part.json").is_file():
            return None
        self.progress.note(f"[{self.num_done}/{self.num_parts}] {title}")
        make_folder(folder)
        return folder

    def _finish(self, folder: Path, done: Trained, files: Sequence[str]) -> None:
        loss = done.validation_loss
        known = loss if loss is not None and math.isfinite(loss) else None
        about = {"round": done.round, "validation_loss": known}
        if done.share is not None:
            about["share"] = done.share
        write_json(folder / "part.json", {**asdict(done.cost), **about})
        list_files(folder, files)
        if (cost := done.cost).tokens:
            words = f"{cost.steps} steps, {cost.tokens} tokens in {human_seconds(cost.seconds)}"
            scored = f", validation loss {known:.3f}" if known is not None else ""
            self.progress.note(f"  {words}{scored}")

    def _kept(self, memory: Path | None, client: str) -> AdapterState:
        """The tensors that a client of a finished run keeps to itself."""
        return {} if memory is None else personal(RunFolder.open(memory), client)
